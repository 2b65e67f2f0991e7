"""Every tensor argument as every kind of tensor there is: the number of plain tensors, or an error that names it.

A tensor whose class, device or memory is not the usual one must never count as "not given", nor be read as if it had
plain memory: both give another number, in silence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from public_calls import CALLS, PublicCall, names_argument
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_fast

NAMED_ERRORS = (TypeError, ValueError, IndexError, NotImplementedError)

# torch's names of collectives change
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

HAS_GLOO = dist.is_available() and dist.is_gloo_available()


UNWAITED: list[Any] = []  # results of collectives that a refused call has not waited for


@pytest.fixture(scope="module", autouse=True)
def one_process_group():
    """A group of this process alone, for collectives and DTensors."""
    if HAS_GLOO and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        while UNWAITED:
            UNWAITED.pop().wait()
        dist.destroy_process_group()
    else:
        yield


# --- kinds of tensors -------------------------------------------------------------------------------------------------


class Wrapper(Tensor):
    """Has no memory of its own: every operator runs on the tensor inside."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Wrapper({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = _pytree.tree_map_only(Wrapper, lambda x: x.inner, (args, kwargs or {}))
        return _pytree.tree_map_only(Tensor, Wrapper, func(*args, **kwargs))


class WithoutStorage(Tensor):
    """A shape, a type and nothing else."""

    @staticmethod
    def __new__(cls, like: Tensor) -> WithoutStorage:
        return Tensor._make_wrapper_subclass(cls, like.size(), dtype=like.dtype, device=like.device)

    def __repr__(self) -> str:
        return "WithoutStorage()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return WithoutStorage(args[0])
        raise NotImplementedError(f"{func} on a tensor without storage")


class PlainSubclass(Tensor):
    """A subclass with memory like any other tensor's."""


def asynchronous(x: Tensor) -> Tensor:
    import torch.distributed._functional_collectives as funcol

    if x.dtype is torch.bool:  # gloo has no collectives of these
        return funcol.AsyncCollectiveTensor(x.clone())
    group = dist.group.WORLD
    found = funcol.all_gather_tensor(x.contiguous(), 0, group) if x.dim() else funcol.all_reduce(x, "sum", group)
    assert isinstance(found, funcol.AsyncCollectiveTensor)
    UNWAITED.append(found)
    return found


def dtensor(x: Tensor, placement: Any) -> Tensor:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(x.clone(), DeviceMesh("cpu", [0]), [placement], run_check=False)


def replicated(x: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate

    return dtensor(x, Replicate())


def sharded(x: Tensor) -> Tensor:
    from torch.distributed.tensor import Shard

    return dtensor(x, Shard(0))


def partial(x: Tensor) -> Tensor:
    from torch.distributed.tensor import Partial

    return dtensor(x, Partial())


def strided(x: Tensor) -> Tensor:
    """Every second element of more memory, whose other elements would be seen: they are too large."""
    room = torch.full((*x.shape, 2), 1 if x.dtype is torch.bool else 99, dtype=x.dtype)
    room[..., 0] = x
    return room[..., 0]


def negative_part(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate: the memory holds -x."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


def conjugate(x: Tensor) -> Tensor:
    view = torch.complex(x, torch.ones_like(x)).conj()
    assert view.is_conj()
    return view


def plain(value: Any) -> Any:
    """What the comparison reads: the tensor inside, whatever is around it."""
    if isinstance(value, Wrapper):
        return plain(value.inner)
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if hasattr(value, "wait"):
        return value.wait()
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def is_integer(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype is not torch.bool


def is_real(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def anything(_: Tensor) -> bool:
    return True


RIGHT, REFUSED, EITHER = "right", "refused", "right or refused"


@dataclass(frozen=True)
class Kind:
    """How a tensor of a kind is made from a plain one, for which, and what must come of it without (with) a gradient."""

    make: Callable[[Tensor], Any]
    suits: Callable[[Tensor], bool] = anything
    outcome: str = EITHER
    with_gradient: str = EITHER


KINDS = {
    "asynchronous": Kind(asynchronous, outcome=RIGHT),
    "replicated": Kind(replicated, outcome=RIGHT),
    "sharded": Kind(sharded, lambda x: x.dim() > 0),
    "partial": Kind(partial, is_real),
    "wrapper": Kind(Wrapper),
    "wrapper_in_wrapper": Kind(lambda x: Wrapper(Wrapper(x))),
    "without_storage": Kind(WithoutStorage, outcome=REFUSED, with_gradient=REFUSED),
    "plain_subclass": Kind(lambda x: x.as_subclass(PlainSubclass), outcome=RIGHT, with_gradient=RIGHT),
    "parameter": Kind(lambda x: torch.nn.Parameter(x, requires_grad=False), outcome=RIGHT, with_gradient=RIGHT),
    "negative_view": Kind(lambda x: torch._neg_view(-x), is_real, RIGHT, RIGHT),
    "negative_part": Kind(negative_part, is_real, RIGHT, RIGHT),
    "conjugate": Kind(conjugate, is_real, REFUSED, REFUSED),
    "fake": Kind(lambda x: FakeTensorMode().from_tensor(x), outcome=REFUSED, with_gradient=REFUSED),
    "meta": Kind(lambda x: x.to("meta"), outcome=REFUSED, with_gradient=REFUSED),
    "other_device": Kind(lambda x: x.cuda(), lambda _: torch.cuda.is_available(), REFUSED, REFUSED),
    "int32": Kind(lambda x: x.int(), is_integer, RIGHT),
    "int8": Kind(lambda x: x.to(torch.int8), is_integer, RIGHT),
    "uint8": Kind(lambda x: x.to(torch.uint8), lambda x: is_integer(x) and bool((x >= 0).all()), RIGHT),
    "other_float": Kind(lambda x: x.float() if x.dtype is torch.float64 else x.double(), is_real),
    "strided": Kind(strided, lambda x: x.dim() > 0, RIGHT, RIGHT),
    "list": Kind(lambda x: x.tolist(), lambda x: x.dim() > 0, REFUSED),
    "array": Kind(lambda x: x.numpy(), lambda x: x.dim() > 0, REFUSED),
}  # fmt: skip

NEED_A_GROUP = ("asynchronous", "replicated", "sharded", "partial")


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None), "a gradient is missing"
        if b is None:
            continue
        assert not isinstance(plain(a), FakeTensor)
        wide = torch.complex128 if b.is_complex() else torch.float64
        torch.testing.assert_close(plain(a).to(wide), b.to(wide), rtol=1e-5, atol=2e-6, equal_nan=True)


CASES = [
    pytest.param(call, argument, kind, id=f"{call.name}-{argument}-{kind}")
    for call in CALLS.values()
    for argument, tensor in call.tensors.items()
    for kind, of_kind in KINDS.items()
    if of_kind.suits(tensor)
]

HEADS = ("weight", "bias", "lora_a", "lora_b", "ref_weight", "ref_bias")


def attempt(call: PublicCall, replaced: dict[str, Any]) -> tuple[Any, Exception | None]:
    """What comes of a call, or the error, if it names one of the arguments."""
    try:
        return call.run(replaced), None
    except NAMED_ERRORS as error:
        if not any(names_argument(error, argument) for argument in replaced):
            raise
        return None, error


@functools.cache
def plain_outcome(name: str) -> tuple[list[Tensor], list[Tensor | None]]:
    return CALLS[name].run()


@pytest.mark.parametrize(("call", "argument", "kind"), CASES)
def test_right_or_named(call: PublicCall, argument: str, kind: str):
    if kind in NEED_A_GROUP and not HAS_GLOO:
        pytest.skip("torch without gloo")
    of_kind, trained = KINDS[kind], argument in call.differentiable
    outcome = of_kind.with_gradient if trained else of_kind.outcome
    if kind == "sharded" and argument in HEADS:
        outcome = RIGHT  # they are gathered
    expected = plain_outcome(call.name)
    value = of_kind.make(call.tensors[argument].clone())
    if trained and isinstance(value, Tensor):
        value.requires_grad_()
    found, error = attempt(call, {argument: value})
    if error is not None:
        assert outcome != RIGHT, str(error)
        return
    assert outcome != REFUSED, "taken"
    same(found[0], expected[0])
    same(found[1], expected[1])


def test_every_function_and_argument_is_in_the_table():
    """A new tensor argument does not stay out of it: annotations name the tensors."""
    import inspect

    for name in {call.function for call in CALLS.values()}:
        signature = inspect.signature(getattr(dpo_fast, name))
        tensors = {
            k for k, p in signature.parameters.items() if "Tensor" in str(p.annotation) or k in ("beta", "margin")
        }
        given = {a for call in CALLS.values() if call.function == name for a in call.tensors}
        assert tensors <= given, (name, tensors - given)
    not_here = {
        "padded_batch",
        "packed_batch",
        "in_batch_pairs",
        "in_batch_negatives",
        "linear_plan",
        "packed_lengths",
        "reference_logps",
        "PackedSampler",
        "SequenceNumbers",
        "packed_hidden",
        "head_options",
        "shared_prompts",
    }  # take no tensors, or in dictionaries and models
    not_here |= {"DPOOutput", "TokenOutput", "get_num_threads", "set_num_threads"}
    assert {call.function for call in CALLS.values()} | not_here >= set(dpo_fast.__all__)


def test_several_at_once():
    """Two arguments of one unusual kind, as a whole batch from a collective has them."""
    call = CALLS["dpo_loss"]
    expected = call.run()
    for kind in ("asynchronous", "wrapper", "negative_view") if HAS_GLOO else ("wrapper", "negative_view"):
        names = [name for name in call.tensors if name != "logits" and KINDS[kind].suits(call.tensors[name])]
        found, error = attempt(call, {name: KINDS[kind].make(call.tensors[name]) for name in names})
        if error is not None:
            assert kind == "wrapper", str(error)
            continue
        same(found[0], expected[0])
        same(found[1], expected[1])


def test_no_memory_is_not_absence():
    """The case that was found: a reference from a collective gave the reference-free loss."""
    call = CALLS["dpo_loss"]
    free = PublicCall(
        "", "dpo_loss", {k: v for k, v in call.tensors.items() if k != "ref_logps"}, {}, ("logits",), ("loss",)
    )
    expected, without = call.run()[0][0], free.run()[0][0]
    assert abs(expected - without) > 1e-3  # the test can tell
    with contextlib.suppress(*NAMED_ERRORS):
        found = call.run({"ref_logps": Wrapper(call.tensors["ref_logps"])})[0][0]
        torch.testing.assert_close(plain(found), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("list", "array")])
@pytest.mark.parametrize(
    "name", ["token_logps", "sequence_logps", "dpo_loss_packed", "linear_token_logps", "linear_dpo_loss_ref"]
)
def test_incoming_gradients(name, kind):
    """Autograd may hand over any kind of gradient: the same numbers or any exception."""
    of_kind = KINDS[kind]
    if kind in NEED_A_GROUP and not HAS_GLOO:
        pytest.skip("torch without gloo")
    call, found = CALLS[name], []
    for make in (lambda x: x, of_kind.make):
        tensors = {k: v.clone().requires_grad_(k in call.differentiable) for k, v in call.tensors.items()}
        lora = {"lora": (tensors.pop("lora_a"), tensors.pop("lora_b"), 0.5)} if "lora_a" in tensors else {}
        out = getattr(dpo_fast, call.function)(**tensors, **lora, **call.options)
        logps = out if isinstance(out, Tensor) and not isinstance(out, tuple) else out.logps
        incoming = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
        if not of_kind.suits(incoming):
            return
        try:
            found.append([torch.autograd.grad(logps, tensors[call.differentiable[0]], make(incoming))[0]])
        except Exception:
            assert make is of_kind.make
            return
    same(found[1], found[0])


# --- the operators ----------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The calls of dpo_fast's operators, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dpo_fast":
            self.calls.append((func, copied(args), copied(kwargs or {})))
        return func(*args, **(kwargs or {}))


def copied(values: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), values)


def registered() -> set[str]:
    import dpo_fast.ops  # noqa: F401  (registers them)

    return {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("dpo_fast::")}


def operator_calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """One call of each operator and number of tensors given, taken from the public functions."""
    recorded = Recorded()
    inplace = [
        PublicCall("", call.function, call.tensors, call.options | {"inplace_backward": True}, call.differentiable, call.through)
        for call in (CALLS[name] for name in ("token_logps", "sequence_logps", "dpo_loss"))
    ]  # fmt: skip
    for call in [*CALLS.values(), *inplace]:
        with contextlib.suppress(TypeError, ValueError), recorded:  # an option that this function does not know
            call.run()
    found = {}
    for func, args, kwargs in recorded.calls:
        given = tuple(isinstance(value, Tensor) for value in _pytree.tree_leaves((args, kwargs)))
        found.setdefault((func, given), (func, args, kwargs))
    return list(found.values())


@pytest.fixture(scope="module")
def recorded_calls():
    return operator_calls()


def test_every_operator_is_called(recorded_calls):
    assert {func._schema.name.split("::")[1] for func, _, _ in recorded_calls} == registered()


@contextlib.contextmanager
def filled_memory():
    """Memory that is not written shows as NaN, and not as what lay there before."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def outcome_of(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Everything that a call gives: its results, and the tensors that it may have written over."""
    with torch.no_grad(), filled_memory():
        out = func(*args, **kwargs)
    values = _pytree.tree_leaves((out, args, kwargs) if func._schema.is_mutable else out)
    return [plain(value) for value in values if isinstance(value, Tensor)]


def name_of(func: Any, args: Any, tensor: Tensor) -> str:
    """What the schema calls a tensor among the arguments."""
    names = (a.name for a, value in zip(func._schema.arguments, args, strict=False) if value is tensor)
    return next(names, "a tensor in a list")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("list", "array")])
def test_operators(recorded_calls, kind):
    """One tensor at a time: the same numbers or any exception."""
    of_kind, tried = KINDS[kind], 0
    if kind in NEED_A_GROUP and not HAS_GLOO:
        pytest.skip("torch without gloo")
    for func, args, kwargs in recorded_calls:
        expected = outcome_of(func, *copied((args, kwargs)))
        leaves, tree = _pytree.tree_flatten((args, kwargs))
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not of_kind.suits(leaf):
                continue
            changed = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            changed[i] = of_kind.make(changed[i])
            tried += 1
            try:
                found = outcome_of(func, *_pytree.tree_unflatten(changed, tree))
            except Exception:
                continue
            try:
                same(found, expected)
            except Exception as error:  # also where there is no number to look at
                raise AssertionError(f"{func}, {name_of(func, args, leaf)}: {error}") from None
    assert tried or kind == "other_device"
