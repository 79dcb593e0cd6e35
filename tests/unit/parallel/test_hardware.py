"""Peak FLOPs of chips, utilization, huge pages."""

import types

import numpy as np
import pytest

from dpo_jax.parallel import hardware


@pytest.mark.parametrize(
    "kind, dtype, expected",
    [
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v4", "float32", 275e12 / 6),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
    ],
)
def test_utilization_of_all_chips_peak(kind, dtype, expected):
    devices = np.array([types.SimpleNamespace(platform="tpu", device_kind=kind)] * 8)
    assert (
        hardware.flops_per_second(types.SimpleNamespace(devices=devices, size=8), dtype)
        == 8 * expected
    )


def test_peak_flops_of_other_chips_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "measured_flops_per_second", lambda dtype: 3.0)
    for kind in (
        "NVIDIA H100 PCIe",
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA L4",
    ):
        devices = np.array([types.SimpleNamespace(platform="gpu", device_kind=kind)] * 2)
        assert (
            hardware.flops_per_second(types.SimpleNamespace(devices=devices, size=2), "bfloat16")
            == 6
        )


@pytest.mark.parametrize(
    ("libc", "tunables", "mode", "lacks"),
    [
        (("glibc", "2.36"), "", "always [madvise] never", True),
        (("glibc", "2.35"), "glibc.malloc.check=3", "always [madvise] never", True),
        (("glibc", "2.36"), "glibc.malloc.hugetlb=1", "always [madvise] never", False),
        (("glibc", "2.36"), "", "always madvise [never]", False),
        (("glibc", "2.36"), "", "[always] madvise never", False),
        (("glibc", "2.36"), "", None, False),
        (("glibc", "2.34"), "", "always [madvise] never", False),
        (("", ""), "", "always [madvise] never", False),  # musl, macOS
    ],
)
def test_huge_pages_are_lacking_where_malloc_could_have_them(
    monkeypatch, tmp_path, libc, tunables, mode, lacks
):
    monkeypatch.setattr(hardware.platform, "libc_ver", lambda: libc)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.setattr(hardware, "HUGE_PAGES_MODE", tmp_path / "enabled")
    if mode:
        (tmp_path / "enabled").write_text(mode + "\n")
    assert hardware.lacks_huge_pages() is lacks
