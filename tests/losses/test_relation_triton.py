"""The Triton kernels: in Triton's interpreter on the CPU, through its compiler, and on a GPU where there is one.

The interpreter decides how kernels are defined when they are imported, so it runs in a process of its own: this file as a
script.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from loss_references import randn, random_mask

from hf_bcd.losses import relation_divergence
from hf_bcd.losses.ops import relation
from hf_bcd.losses.ops.relation import stream_relation


pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# dtype, images, positions, channels of student and teacher, temperature, whether masked
CASES = [
    (torch.float32, 2, 70, 20, 24, 1.0, False),  # more than a tile of rows and columns, less than one of channels
    (torch.float32, 3, 70, 20, 24, 1.7, True),
    (torch.float32, 1, 64, 260, 33, 1.0, True),  # two blocks of the gradient's channels
    (torch.float32, 2, 1, 3, 5, 1.0, False),
    (torch.float16, 3, 140, 20, 70, 1.7, True),
    (torch.bfloat16, 3, 140, 20, 70, 1.7, True),
    (torch.bfloat16, 1, 128, 64, 128, 1.0, False),
    (torch.bfloat16, 1, 128, 64, 64, 1.0, False),  # equal features, for `inputs` draws by the number of channels
]
SHARED_MEMORY = [0, 2**18]  # the second holds the rows of up to 256 channels in half precision
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(
    dtype: torch.dtype, images: int, n: int, student: int, teacher: int, tau: float, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    mask = random_mask(images, n) if masked else None
    if mask is not None and images > 1:
        mask[1] = torch.arange(n) == n - 2  # one valid position
        mask[-1, :65] = False  # a whole tile of columns
    features = (2 * randn(images, n, c, seed=c) / c**0.25 for c in (student, teacher))
    student_features, teacher_features = (x.to(dtype) for x in features)
    return student_features, teacher_features, torch.tensor(tau), mask


def assert_equals_pytorch(actual: tuple[torch.Tensor, ...], case: tuple, device: str = "cpu") -> None:
    """Value, peak and gradient against the streamed PyTorch version in float64."""
    student, teacher, tau, mask = (None if x is None else x.to(device) for x in inputs(*case))
    expected = stream_relation(student.double(), teacher.double(), tau.double(), mask, False, True)
    assert actual[2].dtype == case[0]
    for a, e, tolerance in zip(actual, expected, (1e-5, 1e-5, TOLERANCES[case[0]]), strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= tolerance * e.norm()


def run_interpreted(path: str) -> None:
    """Saves what the kernels return for all cases, with little and with much shared memory."""
    from triton.runtime import interpreter

    from hf_bcd.losses.ops import relation_triton

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *args):
        """The interpreter stores bfloat16 as 16-bit integers and would multiply those."""
        a, b = (
            interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)
            if x.dtype.scalar == interpreter.tl.bfloat16
            else x
            for x in (a, b)
        )
        return multiply(self, a, b, d, *args)

    interpreter.InterpreterBuilder.create_dot = create_dot
    results = {"proof": ()}
    relation._run_kernel = relation_triton.stream_relation_triton
    relation._prove_kernels(*inputs(*CASES[1]))
    assert relation._kernels_proven
    for shared_memory in SHARED_MEMORY:
        relation_triton._shared_memory = lambda device, shared_memory=shared_memory: shared_memory
        for index, case in enumerate(CASES):
            args = inputs(*case)
            value, peak, gradient = relation_triton.stream_relation_triton(*args, True)
            without = relation_triton.stream_relation_triton(*args, False)
            assert torch.equal(without[0], value) and torch.equal(without[1], peak) and without[2].numel() == 0
            results[f"{shared_memory}, {index}"] = (value, peak, gradient)
    torch.save(results, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    command = [sys.executable, "-W", "ignore", __file__, str(path)]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("shared_memory", SHARED_MEMORY)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_interpreted_kernels_equal_pytorch(interpreted, index, shared_memory):
    assert_equals_pytorch(interpreted[f"{shared_memory}, {index}"], CASES[index])


# compute capability: bytes of shared memory that a program can have
CAPABILITIES = {86: 99 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10, 120: 99 * 2**10}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, channels", [("bf16", 256), ("bf16", 300), ("fp32", 256)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_fit(capability, dtype, channels, tmp_path, monkeypatch):
    """Consumer Ampere, Hopper, data centre and consumer Blackwell; the compiler needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_bcd.losses.ops import relation_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared_memory = CAPABILITIES[capability]
    of_student, of_teacher, tiles = kernels.launch_settings(dtype == "bf16", channels, channels, shared_memory)
    assert of_student == of_teacher
    assert tiles["RESIDENT"] == (capability in (90, 100) and dtype == "bf16" and channels == 256)
    pointers = dict.fromkeys(("student", "teacher", "features", "gradient"), dtype) | {"valid": "u8"}
    sizes = dict.fromkeys(("positions", "student_channels", "teacher_channels", "num_channels"), "i32")
    for kernel, settings in ((kernels._lse_kernel, of_student), (kernels._divergence_kernel, tiles)):
        for with_gradient in (True, False):
            known = {"PRECISION": "tf32x3", "WITH_GRADIENT": with_gradient, **settings}
            known = {name: value for name, value in known.items() if name in kernel.arg_names}
            signature = {
                name: "constexpr" if name in known else sizes.get(name, f"*{pointers.get(name, 'fp32')}")
                for name in kernel.arg_names
            }
            compiled = triton.compile(
                ASTSource(fn=kernel, signature=signature, constexprs=known),
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": True} | {key: settings[key] for key in ("num_warps", "num_stages")},
            )
            assert compiled.metadata.shared <= shared_memory


@pytest.fixture
def kernel(monkeypatch):
    """Features on the CPU go to a function in place of the kernels, whose calls are counted."""
    calls = []

    def use(function) -> list[tuple]:
        monkeypatch.setattr(relation, "_run_kernel", lambda *args: calls.append(args) or function(*args))
        return calls

    monkeypatch.setattr(relation, "_kernels_work", True)
    monkeypatch.setattr(relation, "_kernels_proven", False)
    monkeypatch.setattr(relation, "_has_kernel", lambda features: relation._kernels_work)
    return use


def right(student, teacher, tau, mask, with_gradient):
    return stream_relation(student, teacher, tau, mask, False, with_gradient)


def wrong_value(*args):
    value, peak, gradient = right(*args)
    return 1.2 * value, peak, gradient


def wrong_gradient(*args):
    value, peak, gradient = right(*args)
    return value, peak, gradient.roll(1, dims=1)


def blind(student, teacher, tau, mask, with_gradient):
    return right(student, teacher, tau, None, with_gradient)


def broken(*args):
    raise RuntimeError("Failed to find C compiler.\nSecond line")


def two_steps(mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's gradient after two equal steps, and PyTorch's."""
    student, teacher, tau, _ = inputs(*CASES[1])
    student.requires_grad_()
    for _ in range(2):
        relation_divergence(student, teacher, tau=tau, mask=mask).divergence.sum().backward()
    return student.grad, 2 * stream_relation(student.detach(), teacher, tau, mask, False, True)[2]


def test_a_kernel_proves_itself_once(kernel, caplog):
    calls, mask = kernel(right), inputs(*CASES[1])[3]
    torch.testing.assert_close(*two_steps(mask))
    # without a mask and with one on some positions of an image, then the two steps
    assert [len(args[0]) for args in calls] == [1, 1, 3, 3] and relation._kernels_proven
    assert not caplog.records


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (wrong_value, "ArithmeticError: its value differs from PyTorch's by"),
        (wrong_gradient, "ArithmeticError: its gradient differs"),
        (blind, "ArithmeticError: its peak differs"),
        (broken, "RuntimeError: Failed to find C compiler.); the context loss"),
    ],
)
def test_pytorch_takes_over_for_good_from_a_kernel_that_fails(function, cause, kernel, caplog):
    calls, mask = kernel(function), inputs(*CASES[1])[3]
    torch.testing.assert_close(*two_steps(mask))
    assert len(calls) <= 2 and not relation._kernels_work  # both in the first step
    assert [record.levelname for record in caplog.records] == ["WARNING"] and cause in caplog.text


def test_a_full_device_is_no_reason_to_give_triton_up(kernel, caplog):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel(full)
    with pytest.raises(torch.OutOfMemoryError):
        two_steps(None)
    assert relation._kernels_work and not caplog.records


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (torch.bfloat16, 2, 1000, 256, 256, 1.0, True)], ids=str)
def test_kernels_equal_pytorch_on_a_gpu(case):
    from hf_bcd.losses.ops.relation_triton import stream_relation_triton

    args = [None if x is None else x.cuda() for x in inputs(*case)]
    assert_equals_pytorch(stream_relation_triton(*args, True), case, "cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_uses_the_kernels(monkeypatch):
    monkeypatch.setattr(relation, "stream_relation", None)
    student, teacher, tau, mask = inputs(*CASES[1])
    student = student.cuda().requires_grad_()
    assert mask is not None
    relation_divergence(student, teacher.cuda(), tau=tau.cuda(), mask=mask.cuda()).divergence.sum().backward()
    assert student.grad is not None and student.grad.any()


if __name__ == "__main__":
    run_interpreted(sys.argv[1])
