"""Single operations on the simulated GPU, to compare it with the known behaviour of CUDA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functions import simulated_gpu
from .ledger import watch


def x() -> Tensor:
    return torch.arange(6.0).reshape(2, 3).to("cuda")


def on_cpu(*shape: int) -> Tensor:
    return torch.ones(*shape)


def pinned(*shape: int) -> Tensor:
    return torch.zeros(*shape, pin_memory=True)


# Operations that synchronize: the host waits for the GPU.
WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: x()[0, 0].item(),
    "float": lambda: float(x().sum()),
    "if": lambda: 1 if x().any() else 0,
    "tolist": lambda: x().tolist(),
    "cpu": lambda: x().cpu(),
    "nonzero": lambda: x().nonzero(),
    "mask": lambda: x()[x() > 1],
    "equal": lambda: torch.equal(x(), x()),
    "unique": lambda: x().unique(),
    "cholesky": lambda: torch.linalg.cholesky(torch.eye(2, device="cuda")),
    "repeat_interleave": lambda: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
    "copy_ to pageable memory": lambda: on_cpu(2, 3).copy_(x(), non_blocking=True),
    "copy_ that blocks": lambda: pinned(2, 3).copy_(x()),
}
PAGEABLE: dict[str, Callable[[], Any]] = {
    "to": lambda: on_cpu(3).to("cuda"),
    "to without blocking": lambda: on_cpu(3).to("cuda", non_blocking=True),
    "to of pinned memory that blocks": lambda: pinned(3).to("cuda"),
    "tensor": lambda: torch.tensor([1, 2], device="cuda"),
    "as_tensor": lambda: torch.as_tensor(1.0, device="cuda"),
    "new_tensor": lambda: x().new_tensor([1.0]),
    "copy_": lambda: x().copy_(on_cpu(2, 3)),
    "index": lambda: x()[torch.tensor([1, 0])],
    "index by a list": lambda: x()[[1, 0]],
    "assigned at an index": lambda: x().__setitem__(torch.tensor([1, 0]), 0.0),
}
FREE: dict[str, Callable[[], Any]] = {
    "full": lambda: torch.full((), 3.0, device="cuda"),
    "arange": lambda: torch.arange(3, device="cuda"),
    "number of the host": lambda: x() * 2 + torch.tensor(1.0),
    "fill_": lambda: x().fill_(torch.tensor(1.0)),
    "index of its own": lambda: x()[torch.arange(1, device="cuda")],
    "slice": lambda: x()[:, 1:],
    "topk": lambda: x().topk(2),
    "pinned": lambda: pinned(3).to("cuda", non_blocking=True),
    "pinned by pin_memory": lambda: on_cpu(3).pin_memory().to("cuda", non_blocking=True),
    "copy_ to pinned memory": lambda: pinned(2, 3).copy_(x(), non_blocking=True),
    "cholesky_ex": lambda: torch.linalg.cholesky_ex(torch.eye(2, device="cuda")),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "add": lambda: x() + on_cpu(2, 3),
    "matmul": lambda: x() @ on_cpu(3, 2),
    "matmul the other way": lambda: on_cpu(3, 2) @ x(),
    "cat": lambda: torch.cat([x(), on_cpu(2, 3)]),
    "stack of numbers": lambda: torch.stack([x().sum(), torch.tensor(1.0)]),
    "index of a CPU tensor": lambda: on_cpu(3)[torch.arange(1, device="cuda")],
    "value at an index": lambda: x().__setitem__(torch.arange(1, device="cuda"), on_cpu(1, 3)),
    "out": lambda: torch.mul(x(), 2, out=on_cpu(2, 3)),
    "generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "foreach": lambda: torch._foreach_mul_([x()], torch.tensor(2.0)),
    "numpy": lambda: x().numpy(),
}


def seen_by(kind: str, name: str) -> list[str]:
    """The entries of the ledger for one operation of a dictionary above, without those of making `x`."""
    with simulated_gpu(), watch() as setup:
        x()
    with simulated_gpu(), watch() as seen:
        globals()[kind][name]()
    before = {entry.line for entry in setup.entries}
    return [str(entry) for entry in seen.entries if entry.line not in before]


def refusal(name: str) -> str:
    with simulated_gpu():
        try:
            REFUSED[name]()
        except (RuntimeError, TypeError) as error:
            return str(error)
    return ""


def gradients(device: str) -> list[list[float]]:
    """The gradients of a function with views, in-place changes, broadcasting, and a product with a vector."""
    w = (torch.arange(12.0).reshape(3, 4) / 7).to(device).requires_grad_()
    v = torch.ones(3).to(device).requires_grad_()
    y = (v @ w).relu()
    z = torch.zeros(2, 4, device=device)
    z[0] = y
    z[1].add_(2 * y).mul_(3)
    total = z.sin().sum() + (w.T[1:] @ w).square().mean() + (w * 1).unsqueeze(0).squeeze_(0)[0].exp().sum()
    total.backward()
    return [w.grad.flatten().cpu().tolist(), v.grad.cpu().tolist()]


def gradients_of_both() -> tuple[Any, Any, str]:
    """Gradients on the CPU and on the simulated GPU, and the dtype that autocast gives a product on the latter."""
    cpu = gradients("cpu")
    with simulated_gpu():
        with torch.autocast("cuda", torch.bfloat16):
            dtype = str((x() @ x().T).dtype)
        return cpu, gradients("cuda"), dtype


def module_on_both() -> list[Any]:
    """Move a module to the GPU: the parameter objects and their values stay the same, and are on the GPU."""
    with simulated_gpu():
        module = torch.nn.Linear(3, 2)
        weight, before = module.weight, module.weight.detach().clone()
        module.to("cuda")
        there = [module.weight is weight, str(module.weight.device), str(module.bias.device)]
        return [*there, torch.equal(module.weight.detach().cpu(), before)]
