"""bindings/python/adaattn.py on NumPy arrays, against float64. usage: python_module.py LIBRARY SOURCE_DIR"""
import ctypes
import os
import pathlib
import sys

try:
    import numpy
except ImportError:
    print(f"Skipped: no NumPy for {sys.executable}")
    sys.exit(77)
os.environ["ADAATTN_LIBRARY"], SOURCE = sys.argv[1], pathlib.Path(sys.argv[2])
sys.path.insert(0, str(SOURCE / "bindings/python"))
import adaattn

SEED = int(os.environ.get("ADAATTN_TEST_SEED", "1"))
print(f"ADAATTN_TEST_SEED={SEED}")
RANDOM = numpy.random.default_rng(SEED)
PAGE = 16


def normal(*shape):
    return RANDOM.standard_normal(shape, numpy.float32)


def reference(q, k, v, causal=True):
    """One sequence, [tokens, heads, head_dim], in float64; LSE [heads, tokens]."""
    group = q.shape[1] // k.shape[1]
    k, v = (numpy.repeat(x.astype(float), group, axis=1) for x in (k, v))
    scores = numpy.einsum("ihd,jhd->hij", q.astype(float), k) / q.shape[2] ** 0.5
    if causal:
        scores[:, ~numpy.tril(numpy.ones(scores.shape[1:], bool), k.shape[0] - q.shape[0])] = -numpy.inf
    top = scores.max(-1, keepdims=True)
    weights = numpy.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return numpy.einsum("hij,jhd->ihd", weights / total, v), (numpy.log(total) + top)[..., 0]


def close(got, expected):
    assert got.shape == expected.shape
    # f32 sums of up to some hundred terms of order 1.
    worst = abs(got - expected).max()
    assert worst < 1e-5, worst


def poisoned(*shape):
    return numpy.full(shape, numpy.nan, numpy.float32)


def structs_are_those_of_the_header():
    structs, fields = {}, None
    for line in (SOURCE / "tests/abi/layout.txt").read_text(encoding="utf-8").splitlines():
        name, *numbers = line.split()
        if line[0] != " ":
            fields = structs[name] = {"": int(numbers[0])}
        else:
            fields[name] = tuple(map(int, numbers))
    for name, struct in (("tensor", adaattn._Tensor), ("config", adaattn._Config), ("attn_desc", adaattn._AttnDesc),
                         ("adaptive_desc", adaattn._AdaptiveDesc), ("io", adaattn._Io),
                         ("plan_info", adaattn._PlanInfo), ("plan_stats", adaattn._PlanStats),
                         ("head_stats", adaattn._HeadStats)):
        layout = {field: (getattr(struct, field).offset, getattr(struct, field).size) for field, _ in struct._fields_}
        assert structs[f"adaattn_{name}_t"] == {"": ctypes.sizeof(struct), **layout}, name


def batches_in_either_order(context):
    q, k, v = normal(2, 70, 6, 40), normal(2, 90, 2, 40), normal(2, 90, 2, 24)
    o, lse = poisoned(2, 70, 6, 24), poisoned(2, 6, 70)
    context.attention(q, k, v, o, mask="causal", lse=lse)
    for b in range(2):
        expected, expected_lse = reference(q[b], k[b], v[b])
        close(o[b], expected)
        close(lse[b], expected_lse)
    o.fill(numpy.nan)
    q, k, v, o_by_heads = (x.swapaxes(1, 2) for x in (q, k, v, o))
    context.attention(q, k, v, o_by_heads, layout="bhsd")
    for b in range(2):
        close(o[b], reference(*(x[b].swapaxes(0, 1) for x in (q, k, v)), causal=False)[0])


def packed_sequences(context):
    starts = numpy.array([0, 50, 51, 130], numpy.int32)
    q, k, v, o = normal(130, 4, 32), normal(130, 4, 32), normal(130, 4, 32), poisoned(130, 4, 32)
    context.attention(q, k, v, o, layout="thd", mask="causal", cu_seqlens_q=starts, cu_seqlens_k=starts)
    for begin, end in zip(starts, starts[1:]):
        close(o[begin:end], reference(q[begin:end], k[begin:end], v[begin:end])[0])


def pages(context):
    lengths = numpy.array([100, 1, 33], numpy.int32)
    k_pool, v_pool = normal(24, PAGE, 2, 64), normal(24, PAGE, 2, 64)
    table = RANDOM.permutation(24)[:21].reshape(3, 7).astype(numpy.int32)
    q, o = normal(3, 1, 8, 64), poisoned(3, 1, 8, 64)
    with context.plan(q, k_pool, v_pool, o, layout_kv="paged", mask="causal", block_table=table,
                      seqused_k=lengths) as plan:
        plan.execute(q, k_pool, v_pool, o, block_table=table, seqused_k=lengths)
        assert plan.stats()["score_pairs"] == 8 * lengths.sum()
    for b, length in enumerate(lengths):
        k, v = (pool[table[b]].reshape(-1, 2, 64)[:length] for pool in (k_pool, v_pool))
        close(o[b], reference(q[b], k, v)[0])


def policies(context):
    q = k = v = numpy.ones((1, 1024, 2, 64), numpy.float32)
    o = poisoned(1, 1024, 2, 64)
    with context.plan(q, k, v, o, mask="causal", policy="speed", tolerance=0.3) as plan:
        plan.execute(q, k, v, o)
        assert plan.info()["exact"] == 0
        assert plan.stats(reset=True)["tiles"] == 2 * 8 * 9 // 2
        assert plan.stats(wait=False)["tiles"] == 0
        heads = plan.head_stats()
        assert [(h["batch"], h["head"]) for h in heads] == [(0, 0), (0, 1)]
        for h in heads:
            tiles = plan.tile_map(0, h["head"])
            assert [row.find(b"\0") % 9 for row in tiles] == list(range(1, 9)), tiles
            assert abs(sum(row.count(b"\2") for row in tiles) / 36 - h["kept_tiles"]) < 1e-9
    close(o, v)


def enumerations_by_name(context):
    q, k, v = (normal(1, 1024, 2, 64) for _ in range(3))
    o, by_number = poisoned(1, 1024, 2, 64), poisoned(1, 1024, 2, 64)
    names = {"probe": "off", "far_field": False, "rank_mode": "off", "feedback": False, "freeze": True}
    numbers = {"probe": 1, "far_field": 2, "rank_mode": 1, "feedback": 2, "freeze": 1}
    common = {"mask": "causal", "policy": "custom", "tile_mass": 0.5, "tolerance": 1.0}
    context.attention(q, k, v, o, **common, **names)
    context.attention(q, k, v, by_number, **common, **numbers)
    assert (o == by_number).all()
    fields = adaattn._describe(adaattn._views({"q": q, "k": k, "v": v, "o": o}, 0)[0], policy="custom", **names)[1]
    assert all(getattr(fields, name) == value for name, value in numbers.items())


def workspaces(context):
    q, k, v = normal(1, 300, 4, 64), normal(1, 300, 2, 64), normal(1, 300, 2, 64)
    o, own = poisoned(1, 300, 4, 64), poisoned(1, 300, 4, 64)
    with context.plan(q, k, v, o, mask="causal") as plan:
        size = plan.info()["workspace_bytes"]
        assert size > 0
        space = numpy.full((size + 7) // 8, -1, numpy.int64)
        plan.execute(q, k, v, o)
        plan.execute(q, k, v, own, workspace=space)
        assert (o == own).all() and not (space == -1).all()
        try:
            plan.execute(q, k, v, own, workspace=space[:size // 8 - 1])
        except adaattn.Error as error:
            assert "workspace_bytes is" in str(error), error
        else:
            raise AssertionError("a workspace too small was accepted")


def a_context_in_use_stays_usable(_):
    q = k = v = normal(1, 8, 2, 16)
    o = poisoned(1, 8, 2, 16)
    context = adaattn.Context(num_threads=1)
    plan = context.plan(q, k, v, o)
    try:
        context.close()
    except adaattn.Error as error:
        assert "1 live plans" in str(error), error
    else:
        raise AssertionError("a context with a plan was closed")
    plan.execute(q, k, v, o)
    context.attention(q, k, v, o)
    plan.close()
    context.close()


def refusals(context):
    q = k = v = normal(1, 8, 2, 16)
    o = poisoned(1, 8, 2, 16)
    for kind, text, options in ((adaattn.Error, "desc.softcap is -1", {"softcap": -1}),
                                (adaattn.Error, "adaptive.tolerance is -1", {"policy": "speed", "tolerance": -1}),
                                (adaattn.Error, "io.lse.shape[2] is 9; accepted: 8", {"lse": poisoned(1, 2, 9)}),
                                (ValueError, "mask is 'diagonal'; accepted: none", {"mask": "diagonal"}),
                                (ValueError, "probe is 'all'; accepted: default", {"policy": "custom", "probe": "all"}),
                                (ValueError, "window is 5; accepted: (left, right)", {"window": 5}),
                                (TypeError, "sinks is of type list; accepted: arrays", {"sinks": [0, 0]}),
                                (TypeError, "colour is no option", {"colour": 1})):
        try:
            context.attention(q, k, v, o, **options)
        except kind as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"{options} was accepted")
    assert numpy.isnan(o).all()


structs_are_those_of_the_header()
with adaattn.Context(num_threads=2) as shared:
    for case in batches_in_either_order, packed_sequences, pages, policies, enumerations_by_name, workspaces, \
            a_context_in_use_stays_usable, refusals:
        case(shared)
        print(case.__name__)
