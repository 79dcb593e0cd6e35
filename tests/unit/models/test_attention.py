"""Attention within rows: every kernel against dense attention, alone and on meshes."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from dpo_jax.models import attention, flops, transformer
from dpo_jax.models.attention import QUERY_BLOCK, SPLASH_BLOCK, Layout, attend, attend_rows, choose
from dpo_jax.models.log_probs import response_log_probs
from dpo_jax.parallel import sharding
from dpo_jax.planning import topologies
from tests.helpers.tiny import random_pairs


def cudnn_call(q, k, v, prompts=None, window=None, scale=None):
    """The one call of cuDNN, made of plain XLA: whether it says what we mean. It needs a GPU."""
    kernel = functools.partial(attention._cudnn, implementation="xla", scale=scale)
    over_responses = functools.partial(attention._over_responses, kernel, window)
    return attention._on_each_device(over_responses, q, k, v, prompts)


KERNELS = {
    "xla": functools.partial(attend_rows, kernel="xla"),
    "splash": functools.partial(attend_rows, kernel="splash"),  # interpreted on a CPU
    "cudnn's call": cudnn_call,
}


def causal_attention(q_SRTHC, k_SRUKC, v_SRUKC, window=None, kernel=attend_rows):
    """Rows of one sequence each."""
    rows = [x[:, :, None] for x in (q_SRTHC, k_SRUKC, v_SRUKC)]
    return kernel(*rows, window=window)[:, :, 0]


def of_rows(name):
    return functools.partial(causal_attention, kernel=KERNELS[name])


def dense_attention(q_SRTHC, k_SRUKC, v_SRUKC, window, scale=None, softcap=None):
    """The whole square, in the dtype of its arguments."""
    group, length = q_SRTHC.shape[3] // k_SRUKC.shape[3], q_SRTHC.shape[2]
    k_SRUHC, v_SRUHC = (jnp.repeat(x, group, axis=3) for x in (k_SRUKC, v_SRUKC))
    scores_SRHTU = jnp.einsum("SRTHC,SRUHC->SRHTU", q_SRTHC, k_SRUHC)
    scores_SRHTU *= scale or q_SRTHC.shape[-1] ** -0.5
    if softcap:
        scores_SRHTU = softcap * jnp.tanh(scores_SRHTU / softcap)
    distance_TU = np.arange(length)[:, None] - np.arange(length)
    seen_TU = (distance_TU >= 0) & (distance_TU < (window or length))
    weights_SRHTU = jax.nn.softmax(jnp.where(seen_TU, scores_SRHTU, -jnp.inf))
    return jnp.einsum("SRHTU,SRUHC->SRTHC", weights_SRHTU, v_SRUHC)


def value_and_gradients(attend, window):
    def loss(q, k, v, weights):
        out = attend(q, k, v, window=window)
        return (out * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def arrays(shards, rows, length, heads, kv_heads, width, seed=0):
    """Queries, keys, values, and weights of the output in the loss."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(shards, rows, length, h, width)).astype(np.float32)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def agree(found, expected, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), found, expected
    )


@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, QUERY_BLOCK + 30, 1000])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_equal_dense_attention(kernel, window):
    given = arrays(1, 2, 2 * QUERY_BLOCK + 20, 4, 2, 8)
    agree(
        value_and_gradients(of_rows(kernel), window)(*given),
        value_and_gradients(dense_attention, window)(*given),
        atol=2e-5,
    )


def grouped(prompt_lengths, response_lengths, seed=0):
    """Return examples of one response each; lengths of the prompts, and of each one's responses."""
    rng = np.random.default_rng(seed)
    examples = []
    for number, (prompt_length, lengths) in enumerate(
        zip(prompt_lengths, response_lengths, strict=True)
    ):
        prompt = np.r_[number, rng.integers(0, 40, prompt_length)][:prompt_length]
        for length in lengths:
            response = rng.integers(0, 40, length)
            examples.append(Example(prompt.astype(np.int32), (response.astype(np.int32),)))
    return examples


GROUPS = {
    "short": grouped([7, 3, 1, 12], [(2, 5, 3), (4,), (3, 1), (6, 6, 1, 2, 2)]),
    "long": grouped([300, 140, 20], [(150, 20), (30, 31, 2), (140,)]),
    # In whole rows the prompt's tokens have more slots than are gathered one after the other.
    "many": grouped([5, 3], [tuple(range(2, 14)), (4,)]),
}
MOST_RESPONSES = {"short": 5, "long": 3, "many": 12}  # of a prompt


def layouts():
    """Return each kernel with each layout; kernels take long, where they are interpreted."""
    for kernel, responses_per_row, groups in itertools.product(KERNELS, [0, 1, 2, 8], GROUPS):
        is_slow = kernel != "xla" and responses_per_row in (1, 8)
        marks = [pytest.mark.slow] if is_slow else []
        yield pytest.param(kernel, responses_per_row, groups, marks=marks)


@pytest.mark.parametrize("kernel, responses_per_row, groups", layouts())
def test_rows_equal_each_sequence_alone(monkeypatch, kernel, responses_per_row, groups):
    """A flat run in rows of any layout gives what dense attention gives each sequence."""

    def choose_rows(needs, window, most):
        return responses_per_row, needs.rows(responses_per_row).max(axis=0)

    monkeypatch.setattr(packing, "_choose_rows", choose_rows)
    examples = GROUPS[groups]
    shape = packing.shape_of(examples)
    most = max(bucket.responses for bucket in shape.rows)
    assert most == min(max(responses_per_row, 1), MOST_RESPONSES[groups])
    batch = packing.pack(examples, shape)
    one_shard = jax.tree.map(lambda x: x[None], batch)
    layout = Layout(one_shard.rows, one_shard.token_slots)
    q, k, v, weights = [x[:, 0] for x in arrays(1, 1, shape.tokens, 4, 2, 8)]
    is_token = batch.token_slots[:, 0] >= 0
    weights *= is_token[:, None, None]

    # The index of each sequence's tokens in the run, by content: responses follow their prompts.
    first_of_prompt = {}
    sequences = []
    laid_down = 0
    for example in examples:
        key = example.prompt.tobytes()
        if key not in first_of_prompt:
            first_of_prompt[key] = laid_down
            laid_down += len(example.prompt)
        prompt = first_of_prompt[key] + np.arange(len(example.prompt))
        response = laid_down + np.arange(len(example.responses[0]))
        laid_down += len(response)
        sequences.append((prompt, response))

    def each_alone(q, k, v, window):
        out = jnp.zeros_like(q)
        for prompt, response in sequences:
            index = np.r_[prompt, response]
            row = [x[:, None, index] for x in (q, k, v)]
            out = out.at[:, index].set(dense_attention(*row, window)[:, 0])
        return out

    def in_rows(q, k, v, window):
        monkeypatch.setattr(
            attention,
            "attend_rows",
            lambda q, k, v, prompts=None, **_: KERNELS[kernel](q, k, v, prompts),
        )
        return jnp.where(is_token[:, None, None], attend(q, k, v, layout), 0)

    agree(
        value_and_gradients(in_rows, None)(q, k, v, weights),
        value_and_gradients(each_alone, None)(q, k, v, weights),
        atol=5e-5,
    )


@pytest.mark.parametrize("window", [None, 200])
def test_long_rows_in_a_loop(window):
    """More blocks than groups, the last of them not full."""
    given = arrays(1, 1, attention.MOST_GROUPS * QUERY_BLOCK + 300, 2, 1, 8)
    agree(
        value_and_gradients(of_rows("xla"), window)(*given),
        value_and_gradients(dense_attention, window)(*given),
        atol=5e-5,
    )


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 1100])
def test_stripe_of_long_rows_in_a_loop(window):
    """Every fourth query of a row, over the keys of all."""
    stripe = attention.Stripe(3, 4)
    kernel = functools.partial(attend_rows, kernel="xla", stripe=stripe)
    q, k, v, weights = arrays(1, 1, 4 * 700, 2, 1, 8)
    is_own = (np.arange(q.shape[2]) % 4 == 3)[:, None, None]
    (_, expected), (grad_q, *grads_kv) = value_and_gradients(dense_attention, window)(
        q, k, v, weights * is_own
    )
    own = functools.partial(causal_attention, kernel=kernel)
    q, weights = q[:, :, 3::4], weights[:, :, 3::4]
    (_, found), gradients = value_and_gradients(own, window)(q, k, v, weights)
    agree(found, expected[:, :, 3::4], atol=5e-5)
    agree(gradients, (grad_q[:, :, 3::4], *grads_kv), atol=5e-5)


@pytest.mark.parametrize(
    "window, stripes", [(None, 1), pytest.param(256, 1, marks=pytest.mark.slow), (None, 8)]
)
def test_long_rows_take_memory_by_length(window, stripes):
    """Not by its square: the scores of one block are there at a time, or of one for each group."""
    stripe = attention.Stripe(stripes - 1, stripes)
    kernel = functools.partial(attend_rows, kernel="xla", stripe=stripe)
    function = value_and_gradients(functools.partial(causal_attention, kernel=kernel), window)

    def temporaries(length):
        q, k, v, weights = arrays(1, 1, length, 2, 1, 8)
        q, weights = q[:, :, ::stripes], weights[:, :, ::stripes]
        return function.lower(q, k, v, weights).compile().memory_analysis()

    sizes = [temporaries(length).temp_size_in_bytes for length in (2048, 4096, 8192)]
    assert sizes[1] < 2.2 * sizes[0] and sizes[2] < 2.2 * sizes[1]


def test_rows_are_in_one_bucket_on_a_gpu():
    rows = {platform: attention.row_limits(7, platform) for platform in ("cpu", "gpu", "tpu")}
    assert {limits.window for limits in rows.values()} == {7}
    assert rows["cpu"].buckets == rows["tpu"].buckets == packing.BUCKETS > rows["gpu"].buckets == 1
    shapes = {
        platform: packing.shape_of(GROUPS["long"], limits=attention.row_limits(None, platform))
        for platform in rows
    }
    assert len(shapes["gpu"].rows) == 1 < len(shapes["cpu"].rows)


def test_window_in_two_parts_is_refused():
    q, k, v, _ = [x[:, :, None] for x in arrays(1, 2, 4, 2, 2, 8)]
    prompts = attention.Prompts(k[:, :, 0], v[:, :, 0], jnp.array([[4, 2]]))
    with pytest.raises(ValueError, match="rows of 8 tokens in two parts .* a window of 7"):
        attend_rows(q, k, v, prompts, window=7)
    # One that no row reaches changes nothing.
    np.testing.assert_array_equal(
        attend_rows(q, k, v, prompts, window=8), attend_rows(q, k, v, prompts)
    )


@pytest.mark.parametrize("length", [1, QUERY_BLOCK, SPLASH_BLOCK[4] + 1])
def test_splash_rows_of_any_length(length):
    given = arrays(1, 1, length, 2, 1, 80)
    agree(
        value_and_gradients(of_rows("splash"), None)(*given),
        value_and_gradients(dense_attention, None)(*given),
        atol=5e-5,
    )


# 4: two devices share a key head.
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
def test_kernels_on_meshes(sizes):
    given = arrays(4, 1, 20, 4, 2, 16)
    expected = value_and_gradients(dense_attention, None)(*given)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(
                x,
                NamedSharding(
                    mesh, sharding.fitting(mesh, P(sharding.BATCH, None, None, "tensor"), x.shape)
                ),
            )
            for x in given
        ]
        compiled = value_and_gradients(of_rows("splash"), None).lower(*placed).compile()
        (_, out), _ = found = compiled(*placed)
    agree(found, expected, atol=2e-5)
    if sizes == (2, 2, 2):
        assert out.sharding.shard_shape(out.shape) == (1, 1, 20, 2, 16)
        assert "all-gather" not in compiled.as_text()  # nothing but the loss is sent


@pytest.mark.parametrize("axes", [dict(fsdp=2, tensor=4), dict(fsdp=2, context=4)], ids=str)
def test_log_probs_equal_by_every_kernel(tiny, axes):
    """Over a flat batch, whose rows share prompts."""
    config, params = tiny
    mesh = sharding.make_mesh(data=1, **axes)
    examples = random_pairs(4)
    shape = packing.shape_of(examples, limits=packing.RowLimits(stripes=mesh.shape["context"]))
    batch = jax.tree.map(
        lambda *shards: np.stack(shards),
        *(packing.pack(examples[i : i + 2], shape) for i in (0, 2)),
    )
    assert len(shape.rows) > 1 or shape.rows[0][0] > 1

    def loss(params, kernel):
        log_probs_SQ = response_log_probs(
            dataclasses.replace(config, attention=kernel), params, batch
        )
        return (
            log_probs_SQ * jnp.array([1.0, -1.0] * (log_probs_SQ.shape[1] // 2))
        ).sum(), log_probs_SQ

    with jax.set_mesh(mesh):
        found = {
            kernel: jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
                params, kernel
            )
            for kernel in ("xla", "splash")
        }
    for splash, xla in zip(*map(jax.tree.leaves, (found["splash"], found["xla"])), strict=True):
        # Gradients of up to 75.
        np.testing.assert_allclose(splash, xla, atol=2e-5 * max(1.0, np.abs(xla).max()))


@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2)])
def test_splash_products_are_counted(sizes):
    """One block of 256 by 256 for each of 8 rows and 4 heads; plain XLA leaves out a quarter of the
    square.
    """
    given = arrays(4, 2, 2 * QUERY_BLOCK, 4, 2, 8)[:3]
    mesh = sharding.make_mesh(*sizes) if sizes else sharding.make_mesh()
    for kernel, share in (("splash", 1), ("xla", 3 / 4)):
        with jax.set_mesh(mesh) if sizes else contextlib.nullcontext():
            traced = jax.jit(of_rows(kernel)).trace(*given)
        assert flops.of_program(traced.jaxpr.jaxpr) == share * 2 * 2 * 8 * 4 * 256 * 256 * 8


def products(jaxpr):
    """The matrix products of a jaxpr and of all inside."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in flops._jaxprs(value):
                yield from products(inner)


@pytest.mark.parametrize(
    "dtype, precision",
    [("bfloat16", jax.lax.Precision.DEFAULT), ("float32", jax.lax.Precision.HIGHEST)],
)
def test_splash_precision(dtype, precision):
    """The TPU compiler refuses it bfloat16 products at the precision that runtime.start asks of
    float32's.
    """
    given = [jnp.asarray(x, dtype) for x in arrays(1, 1, 20, 2, 1, 8)]
    with jax.default_matmul_precision("float32"):
        traced = value_and_gradients(of_rows("splash"), None).trace(*given)
    found = [equation.params["precision"] for equation in products(traced.jaxpr.jaxpr)]
    # Two, three and four in its three kernels.
    assert len(found) >= 9 and set(found) == {(precision, precision)}


def on(monkeypatch, platform, kind):
    monkeypatch.setattr(
        attention, "device", lambda: types.SimpleNamespace(platform=platform, device_kind=kind)
    )


@pytest.mark.parametrize(
    "platform, kind, kernel, dtype, width, expected",
    [
        ("cpu", "cpu", "auto", "bfloat16", 64, "xla"),
        ("cpu", "cpu", "splash", "float32", 64, "splash"),
        ("tpu", "TPU v4", "auto", "float32", 64, "splash"),
        ("tpu", "TPU v7x", "auto", "bfloat16", 256, "splash"),
        ("tpu", "TPU v4", "xla", "bfloat16", 64, "xla"),
        ("gpu", "NVIDIA H200", "auto", "bfloat16", 64, "cudnn"),
        ("gpu", "NVIDIA H200", "auto", "float32", 64, "xla"),
        ("gpu", "NVIDIA H200", "auto", "bfloat16", 20, "xla"),
        ("gpu", "NVIDIA H200", "auto", "bfloat16", 256, "xla"),
        ("gpu", "NVIDIA H200", "cudnn", "bfloat16", 256, "cudnn"),
        ("gpu", "AMD Instinct MI300X", "auto", "bfloat16", 64, "xla"),
        ("gpu", "Tesla T4", "auto", "bfloat16", 64, "xla"),
        ("gpu", "NVIDIA L40S", "cudnn", "bfloat16", 64, "cudnn"),
    ],
)
def test_choose_auto_by_device(monkeypatch, platform, kind, kernel, dtype, width, expected):
    on(monkeypatch, platform, kind)
    assert choose(kernel, dtype, width) == expected


def test_choose_for_a_softcap(monkeypatch):
    on(monkeypatch, "tpu", "TPU v4")
    assert choose("auto", "bfloat16", 64, 50.0) == "splash"
    on(monkeypatch, "gpu", "NVIDIA H200")
    assert choose("auto", "bfloat16", 64, 50.0) == "xla"
    assert attention.why_not_cudnn("bfloat16", 64, 50.0) == "cuDNN has no soft cap of scores"
    with pytest.raises(ValueError, match="'cudnn' has no softcap of scores"):
        choose("cudnn", "bfloat16", 64, 50.0)


@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn's call"])
def test_attend_rows_scale_and_softcap(kernel):
    """Scores bent by a cap that they reach, of queries with a scale of their own."""
    given = arrays(1, 2, 20, 4, 2, 8)
    options = dict(scale=0.6) if kernel == "cudnn's call" else dict(scale=0.6, softcap=1.5)
    attend = functools.partial(KERNELS[kernel], **options)
    found = value_and_gradients(functools.partial(causal_attention, kernel=attend), 7)(*given)
    dense = functools.partial(dense_attention, **options)
    expected = value_and_gradients(dense, 7)(*given)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize(
    "kernel, platform, dtype, width, message",
    [
        (
            "cudnn",
            "cpu",
            "bfloat16",
            64,
            "config.model.attention = 'cudnn' runs on gpu, not on cpu: take auto",
        ),
        ("splash", "gpu", "bfloat16", 64, "'splash' runs on cpu and tpu, not on gpu"),
        (
            "cudnn",
            "gpu",
            "float32",
            64,
            "takes model.dtype=bfloat16 and heads .* not float32 and 64: take auto",
        ),
        ("cudnn", "gpu", "bfloat16", 20, "not bfloat16 and 20"),
    ],
)
def test_choose_refuses_kernel(monkeypatch, kernel, platform, dtype, width, message):
    on(monkeypatch, platform, "NVIDIA H200")
    with pytest.raises(ValueError, match=message):
        choose(kernel, dtype, width)


def test_cudnn_is_called(monkeypatch):
    """By what it would be given on a GPU: rows as one axis, in its layout."""
    on(monkeypatch, "gpu", "NVIDIA H200")
    given = [jnp.asarray(x, "bfloat16") for x in arrays(2, 3, 20, 4, 2, 8)[:3]]
    seen = []

    def cudnn(q_BTHC, k_BUKC, v_BUKC, **options):
        seen.append((q_BTHC.shape, k_BUKC.shape, options))
        return q_BTHC

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    assert causal_attention(*given, window=5).shape == given[0].shape
    assert seen == [
        (
            (6, 20, 4, 8),
            (6, 20, 2, 8),
            dict(
                mask=None,
                scale=8**-0.5,
                is_causal=True,
                implementation="cudnn",
                local_window_size=(4, 0),
            ),
        )
    ]


@pytest.mark.parametrize("prompt, response", [(3, 5), (4, 5), (3, 4), (4, 4), (0, 5)])
def test_cudnn_is_called_with_even_lengths(monkeypatch, prompt, response):
    """Its backward pass takes no others."""
    on(monkeypatch, "gpu", "NVIDIA H200")
    q, k, v, _ = arrays(2, 3, response, 4, 2, 8)
    _, k_SRUKC, v_SRUKC, _ = arrays(2, 3, prompt, 4, 2, 8, seed=1)
    prompts = None
    if prompt:
        prompts = attention.Prompts(k_SRUKC, v_SRUKC, jnp.array([[1, 2, 3], [3, 2, 1]]))
    rows = [jnp.asarray(x[:, :, None]) for x in (q, k, v)]
    expected = attend_rows(*rows, prompts, kernel="xla")
    seen = []
    attention_of_jax = jax.nn.dot_product_attention

    def cudnn(q_BTHC, k_BUKC, v_BUKC, *, implementation, **options):
        seen.append((q_BTHC.shape[1] % 2, k_BUKC.shape[1] % 2))
        assert not prompt or options["mask"].any(axis=-1).all(), "a query that sees no key"
        return attention_of_jax(q_BTHC, k_BUKC, v_BUKC, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    monkeypatch.setattr(attention, "choose", lambda kernel, *_: kernel)
    found = attend_rows(*rows, prompts, kernel="cudnn")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert seen == [(0, 0)]


@pytest.mark.parametrize("remat", ["none", "full", pytest.param("dots", marks=pytest.mark.slow)])
def test_splash_under_remat_and_vmap(tiny, remat):
    """bfloat16, whole sequences; two sets of weights under vmap, as policies side by side have."""
    config, params = tiny
    # Steeper ones have gradients in bfloat16 that differ by more than themselves from float32's,
    # with any kernel, so that the order of a sum would decide.
    params = jax.tree.map(lambda x: x / 4, params)
    tokens_BT = np.random.default_rng(0).integers(0, 40, (2, 12))
    both = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), params)

    def loss(params, kernel, dtype):
        model = dataclasses.replace(config, attention=kernel, remat=remat, dtype=dtype)
        return jax.nn.log_softmax(transformer.logits(model, params, tokens_BT))[..., 3].mean()

    def gradient(kernel, dtype):
        of_one = functools.partial(jax.value_and_grad(loss), kernel=kernel, dtype=dtype)
        return jax.jit(jax.vmap(of_one))(both)

    expected = jax.tree.leaves(gradient("xla", "float32"))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):  # bfloat16: 8 bits
        for splash, xla in zip(jax.tree.leaves(gradient("splash", dtype)), expected, strict=True):
            assert np.abs(splash - xla).max() <= tolerance * np.abs(xla).max()


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu (no TPU)"
)


def count_kernels(slice_, loss, *arrays) -> int:
    """Return the Pallas kernels of a loss and its gradient, as compiled for a slice of a TPU.

    arrays: (shape, dtype) of each argument. Shards come first; heads, where there are any, come
    last but one.
    """
    mesh = sharding.make_mesh(1, 2, 2, devices=topologies.parse(slice_).devices())
    abstract = []
    for shape, dtype in arrays:
        spec = [sharding.BATCH, *[None] * (len(shape) - 1)]
        if len(shape) > 2:
            spec[-2] = "tensor"
        split = NamedSharding(mesh, P(*spec))
        abstract.append(jax.ShapeDtypeStruct(shape, dtype, sharding=split))
    of_floats = [i for i, (_, dtype) in enumerate(arrays) if dtype != "int32"]
    step = jax.jit(jax.value_and_grad(loss, argnums=of_floats))
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):  # as runtime.start says
        text = step.lower(*abstract).compile().as_text()
    return text.count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.parametrize(
    "slice_, dtype, width",
    [
        ("v4:2x2x1", "bfloat16", 256),
        ("v4:2x2x1", "float32", 256),
        ("v5e:2x2", "bfloat16", 80),
        ("v5e:2x2", "float32", 64),
        ("v5p:2x2x1", "bfloat16", 128),
        ("v6e:2x2", "bfloat16", 256),
    ],
)
def test_tpu_compiler_takes_splash(slice_, dtype, width):
    length = SPLASH_BLOCK[jnp.dtype(dtype).itemsize]  # the largest block

    def loss(q, k, v):
        return causal_attention(q, k, v).astype(jnp.float32).sum()

    q, k = [((2, 1, length, heads, width), dtype) for heads in (4, 2)]
    # Forward, queries' gradient, keys' and values'.
    assert count_kernels(slice_, loss, q, k, k) == 3


@needs_libtpu
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("slice_", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpu_compiler_takes_rows_in_two_parts(slice_, width):
    """Rows of a prompt with three responses; where most memory is needed, in several blocks too."""
    dtype = "bfloat16" if width != 80 else "float32"
    longest = SPLASH_BLOCK[jnp.dtype(dtype).itemsize]

    def loss(q, k, v, prompt_k, prompt_v, lengths):
        prompts = attention.Prompts(prompt_k, prompt_v, lengths)
        return attend_rows(q, k, v, prompts).astype(jnp.float32).sum()

    lengths_of_parts = [(512, 128)]
    if width == 256:
        lengths_of_parts.append((longest + 70, longest + 6))
    for prompt, response in lengths_of_parts:
        q, k = [((2, 2, 3, response, heads, width), dtype) for heads in (4, 2)]
        prompt_k = ((2, 2, prompt, 2, width), dtype)
        lengths = ((2, 2), "int32")
        found = count_kernels(slice_, loss, q, k, k, prompt_k, prompt_k, lengths)
        # As above: a prompt's keys stand before a response's own, in the same three kernels.
        assert found == 3, (prompt, response)
