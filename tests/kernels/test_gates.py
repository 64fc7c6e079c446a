"""The gates themselves: each must refuse what it is there to refuse, and nothing else."""

import inspect
import os
import signal

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from corelib.kernels.gates import compile as compile_gate  # noqa: E402
from corelib.kernels.gates import mutants as mutants_gate  # noqa: E402
from corelib.kernels.gates.architecture import ARCHITECTURES, occupancy  # noqa: E402
from corelib.kernels.gates.interpreter import KernelError, Native  # noqa: E402
from corelib.kernels.gates.mutants import Mutant, mutants, survivors  # noqa: E402
from corelib.kernels.gates.specialisation import TARGETS, Specialisation  # noqa: E402

DEMO = "corelib.kernels.gates.demo"
CASES = "corelib.kernels.gates.cases:forward_backward"


# ---- gate 1: interpretation, poisoned and checked memory


@triton.jit
def _copy(x, out, n, EXTRA: tl.constexpr, STEP: tl.constexpr):
    o = tl.program_id(0) * STEP + tl.arange(0, 8)
    tl.store(out + o, tl.load(x + o, mask=o < n + EXTRA), mask=o < n)


def copy(x, extra=0, step=8):
    out = torch.empty_like(x)
    _copy[(triton.cdiv(x.numel(), step),)](x, out, x.numel(), EXTRA=extra, STEP=step)
    return out


def cube(x, y=None):
    return x**3, x.sum() if y is None else (x * y).sum()


def half_written(x):
    out = torch.empty_like(x)
    out[0] = x[0]
    return out, torch.empty(2, dtype=torch.int32)


def test_copy_is_right_and_its_memory_clean(interpreter):
    x = torch.arange(13.0)
    (out,), grads = interpreter.call(CASES, f"{__file__}:copy", (x,))
    assert torch.equal(out, x) and grads == ()


def test_reading_past_the_end_is_found(interpreter):
    with pytest.raises(KernelError, match=r"program \(1, 0, 0\) reads 1 of 6 elements outside"):
        interpreter.call(CASES, f"{__file__}:copy", (torch.arange(13.0), 1))


def test_two_programs_writing_one_cell_are_found(interpreter):
    with pytest.raises(KernelError, match=r"race: program \(1, 0, 0\) writes a cell"):
        interpreter.call(CASES, f"{__file__}:copy", (torch.arange(13.0), 0, 4))


def test_what_is_not_written_is_poison(interpreter):
    (out, counts), _ = interpreter.call(CASES, f"{__file__}:half_written", (torch.ones(3),))
    assert out[0] == 1 and out[1:].isnan().all() and (counts < -1000).all()


def test_gradients_of_args_then_kwargs(interpreter):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    d_out = (torch.ones(2), torch.tensor(10.0))
    _, grads = interpreter.call(CASES, f"{__file__}:cube", (x,), {"y": y}, d_out)
    assert torch.equal(grads[0], 3 * x**2 + 10 * y) and torch.equal(grads[1], 10 * x)
    _, (d_x,) = interpreter.call(CASES, f"{__file__}:cube", (x,), {}, (torch.ones(2), None))
    assert torch.equal(d_x, 3 * x**2)
    with pytest.raises(KernelError, match="grad_outs: expected 2 entries, got 1"):
        interpreter.call(CASES, f"{__file__}:cube", (x,), {}, (torch.ones(2),))


def test_the_gpu_runner_answers_like_the_interpreter(monkeypatch):
    monkeypatch.setattr("corelib.kernels.gates.interpreter._moved", lambda value, device: value)
    _, (d_x,) = Native().call(
        CASES, f"{__file__}:cube", (torch.ones(2),), {}, (torch.ones(2), None)
    )
    assert torch.equal(d_x, torch.full((2,), 3.0))


# ---- gate 2: offline compilation


@pytest.fixture(scope="module")
def compiled():
    """The demonstration kernels, compiled for an NVIDIA and an AMD target."""
    found = compile_gate.compile_module(DEMO, ["sm_80", "gfx942"])
    return {(row["label"], row["target"]): row for row in found}


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_spilling_kernel_is_refused(compiled, target):
    row = compiled["spills", target]
    assert row["spills"] > 0
    assert row["problems"] == [f"spills {row['spills']} bytes a thread"]


def test_a_dot_without_matrix_instructions_is_refused(compiled):
    row = compiled["fp32 without matrix instructions", "sm_80"]
    assert row["has_dot"] and row["plain_dots"] == 1 and row["matrix_instructions"] == {}
    assert "1 of its dots use no matrix instructions" in row["problems"]
    amd = compiled["fp32 without matrix instructions", "gfx942"]  # AMD's units do multiply fp32
    assert amd["problems"] == [] and any(n.startswith("v_mfma") for n in amd["matrix_instructions"])


def test_good_kernels_pass(compiled):
    for label, dot in (("fp16", True), ("fp32", False)):
        for target in ("sm_80", "gfx942"):
            row = compiled[label, target]
            assert row["problems"] == [] and row["has_dot"] == dot
            assert row["spills"] == 0 and 0 < row["registers"] < 128 and 0 < row["occupancy"] <= 1
    assert list(compiled["fp16", "sm_80"]["matrix_instructions"]) == ["HMMA"]


def test_other_problems_have_words():
    good = dict.fromkeys(("spills", "scalar_spills", "shared", "plain_dots"), 0)
    good |= {"shared_limit": 1000, "has_dot": False, "matrix_instructions": {}, "occupancy": 0.5}
    assert compile_gate.problems(good) == []
    for change, words in (
        ({"shared": 1001}, "needs 1001 bytes of shared memory of 1000"),
        ({"scalar_spills": 40}, "spills 40 scalar registers"),
        ({"has_dot": True}, "holds a tl.dot, but no matrix instruction"),
        ({"occupancy": 0.0}, "not even one program fits on a multiprocessor"),
    ):
        assert compile_gate.problems(good | change) == [words]


def test_a_wrong_declaration_is_a_problem_in_its_row():
    from corelib.kernels.gates import demo

    spec = Specialisation("_add_kernel", "wrong", "forward", {"x": "*fp32", "z": "i32"})
    row = compile_gate.compiled_row(demo, spec, "sm_80")
    assert row["registers"] is None
    assert "not declared ['BLOCK', 'n', 'out', 'y'], unknown ['z']" in row["problems"][0]


def test_matrix_instructions_are_told_from_others():
    lines = [
        "        /*01d0*/                   HMMA.16816.F32 R4, R8, R2, R4 ;",
        "        /*01e0*/              @!P0 HGMMA.64x64x16.F32 R24, gdesc[UR4] ;",
        "        /*01f0*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12] ;",
        "        /*0200*/                   FFMA R0, R1, R2, R3 ;",
        "        /*0210*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;",
        "        /* 0x000000ffMMA HMMA */",
    ]
    found = compile_gate._NVIDIA_MATRIX.findall("\n".join(lines))
    assert found == ["HMMA", "HGMMA", "UTCHMMA"]


def test_occupancy():
    assert occupancy("sm_80", 32, 0, 4) == 1.0
    assert occupancy("sm_80", 64, 0, 4) == 0.5  # registers: 32 of 64 warps
    assert occupancy("sm_90", 255, 0, 4) == 0.125
    assert occupancy("sm_80", 32, 80 * 1024, 4) == 2 * 4 / 64  # shared: 2 of 164 KiB
    assert occupancy("sm_90", 32, 80 * 1024, 4) == 2 * 4 / 64 < occupancy("sm_90", 32, 70000, 4)
    assert occupancy("sm_90", 16, 0, 1) == 0.5  # 32 programs of one warp
    assert occupancy("sm_100", 64, 0, 8, tensor_memory=512) == 8 / 64
    assert occupancy("gfx942", 102, 0, 4) == 0.5  # as LLVM says: 4 waves a SIMD
    assert occupancy("gfx942", 292, 0, 4) == 0.125
    assert occupancy("sm_80", 32, ARCHITECTURES["sm_80"].shared_per_program + 1, 4) == 0


def test_specialisations_refuse_mistakes_and_merge_overrides():
    base = {"kernel": "k", "label": "l", "direction": "forward", "signature": {"x": "*fp32"}}
    change = {"gfx942": {"num_warps": 8, "constexprs": {"B": 2}}}
    spec = Specialisation(**base, constexprs={"A": 1, "B": 1}, overrides=change)
    assert spec.on("gfx942").num_warps == 8 and spec.on("gfx942").constexprs == {"A": 1, "B": 2}
    assert all(spec.on(t).constexprs == {"A": 1, "B": 1} for t in TARGETS if t != "gfx942")
    for wrong in (
        {"direction": "sideways"},
        {"constexprs": {"x": 1}},
        {"divisible": ("y",)},
        {"overrides": {"sm_70": {}}},
        {"overrides": {"sm_80": {"warps": 1}}},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Specialisation(**{**base, **wrong})


# ---- mutants


def check_add_and_matmul():
    from corelib.kernels.gates.demo import masked_matmul, vector_add

    x, y = torch.arange(300.0), torch.ones(300)
    torch.testing.assert_close(vector_add(x, y), x + y)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 40, generator=generator), torch.randn(40, 35, generator=generator)
    torch.testing.assert_close(masked_matmul(a, b), a @ b)


def check_that_notices_crashes_only():
    from corelib.kernels.gates import demo

    if "(o) <= (n)" in inspect.getsource(demo):
        os.kill(os.getpid(), signal.SIGSEGV)


def check_that_fails():
    raise AssertionError("it is wrong anyway")


def test_a_good_check_leaves_no_survivors():
    functions = ["_add_kernel", "_matmul_kernel"]
    found = mutants(inspect.getsource(_demo()), functions=functions)
    assert len(found) >= 25
    assert {m.kind for m in found} == {"mask", "bound", "comparison", "stride", "range"}
    assert survivors(DEMO, f"{__file__}:check_add_and_matmul", functions=functions) == []


def test_survivors_crashes_and_declared_equivalents():
    check, only = f"{__file__}:check_that_notices_crashes_only", ["_add_kernel"]
    every = mutants(inspect.getsource(_demo()), functions=only)
    declared = {"_add_kernel: BLOCK -> (BLOCK + 1)": "a test of declarations"}
    alive = survivors(DEMO, check, functions=only, equivalent=declared)
    assert len(alive) == len(every) - 2  # one crashed, one is declared
    assert not any("<=" in mutant.after or "BLOCK" in mutant.before for mutant in alive)


def test_declarations_must_be_true(monkeypatch):
    def all_caught(module, check, chosen):
        return [mutants_gate.Outcome(mutant, True, "noticed") for mutant in chosen]

    monkeypatch.setattr(mutants_gate, "outcomes_of", all_caught)
    with pytest.raises(ValueError, match="no such mutants"):
        survivors(DEMO, "any:check", equivalent={"_add_kernel: o -> p": "because"})
    with pytest.raises(ValueError, match="catches these after all"):
        survivors(DEMO, "any:check", equivalent={"_add_kernel: BLOCK -> (BLOCK + 1)": "so"})


def test_a_check_that_always_fails_is_an_error():
    with pytest.raises(RuntimeError, match="it is wrong anyway"):
        survivors(DEMO, f"{__file__}:check_that_fails", functions=["_add_kernel"], limit=1)


KERNEL = '''
@jit
def attend(acc, scores, alpha, scale, stride, n, B: tl.constexpr):
    """é: bytes and characters differ."""
    o = tl.arange(0, B) * stride
    scores = tl.where(o < n, scores * scale, 0.0)
    for i in range(n, 2 * n, B):
        acc = tl.dot(scores, scores, acc * alpha[:, None])
    acc *= alpha
    tl.store(acc + o, acc, mask=o <= n)

def helper(x):
    return x * 2 < 3
'''


def test_every_kind_of_mutant_is_generated():
    changes = {(m.kind, m.before, m.after) for m in mutants(KERNEL)}
    assert changes == {
        ("stride", "stride", "(stride + 1)"),
        ("where", "o < n", "((o < n) == (o < n))"),
        ("where", "o < n", "((o < n) != (o < n))"),
        ("bound", "o < n", "(o) <= (n)"),
        ("comparison", "o < n", "(o) > (n)"),
        ("scale", "scores * scale", "(scores)"),
        ("range", "2 * n", "(2 * n) - (B)"),
        ("range", "n", "(n) + (B)"),
        ("stride", "n", "(n + 1)"),
        ("rescale", "acc * alpha[:, None]", "acc"),
        ("rescale", "alpha", "1.0"),
        ("mask", "o <= n", "((o <= n) == (o <= n))"),
        ("bound", "o <= n", "(o) < (n)"),
        ("comparison", "o <= n", "(o) >= (n)"),
    }
    for mutant in mutants(KERNEL):
        assert isinstance(mutant, Mutant)
        compile(mutant.apply(KERNEL), "mutant", "exec")
        assert KERNEL.encode()[mutant.start : mutant.end].decode() == mutant.before
    with pytest.raises(ValueError, match="kinds"):
        mutants(KERNEL, kinds=["typo"])


def _demo():
    from corelib.kernels.gates import demo

    return demo
