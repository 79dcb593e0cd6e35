"""Folders of stages: who works on one."""

import threading

from dpo_jax.workdir import lock_folder


def test_a_stage_that_another_holds_for_a_moment_is_waited_for(tmp_path):
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock_folder(tmp_path):
            held.set()
            release.wait()

    threading.Thread(target=hold).start()
    held.wait()
    threading.Timer(0.3, release.set).start()
    with lock_folder(tmp_path):
        assert release.is_set()
