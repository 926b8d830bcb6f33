"""Nothing outside its tensors is read or written, no input changes, and whoever misuses `inplace` is told.

Every tensor argument is a part of a buffer of poison, and so is all that the package allocates: what strays
reads NaN or leaves a trace. In Triton's interpreter every address is checked too:
benchmarks/traffic/addresses.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from guarded import Allocations, Surrounded, bits, contiguous_copy
from parity import NEEDS_DYNAMO, every_branch, user_loss
from products import assert_same_products, lengths, magnitudes, on_a_grid
from torch import Tensor

from grpo_kernels import (
    KL,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    log_ratio_loss,
    selective_logps,
)
from grpo_kernels.linear import Chunks
from grpo_kernels.logps import linear_token_statistics
from grpo_kernels.policy_loss import policy_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IN_PLACE = "modified by an inplace operation"
ROWS = ("logits", "ref_logits")  # whose last dimension the API wants whole
HEADS = ("hidden", "lm_head_weight", "ref_hidden", "ref_lm_head_weight")

SPECS: dict[str, tuple[LossSpec, str | None]] = {  # and how the reference comes
    "PPO": (LossSpec(PPOClip()), None),
    "exact KL, entropy": (LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1), "logits"),
    "forward KL": (LossSpec(PPOClip(), KL("exact_forward")), "logits"),
    "k3": (LossSpec(PPOClip(), KL("k3")), "logps"),
    "LogRatio": (LossSpec(LogRatio()), "logits"),
    "GSPO": (LossSpec(PPOClip(), KL("k3", ratio_corrected=True), level="sequence"), "logits"),
    "GSPO-token": (LossSpec(PPOClip(), level="sequence-token"), None),
    "callable": (LossSpec(user_loss, aggregation="seq-mean-token-mean"), "logps"),
}
both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
specs = pytest.mark.parametrize("name", SPECS)


class Call(NamedTuple):
    """A function of the package, its tensors and its other arguments."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    learns: tuple[str, ...]  # the tensors that get gradients

    def run(
        self, given: dict[str, Tensor], leaves: dict[str, Tensor] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """All that it returns, and the gradients of a weighted sum of it, in which some weights are 0.

        leaves: what `given` was made of, where that is not differentiated by itself.
        """
        by = [(leaves or given)[name].requires_grad_() for name in self.learns]
        found = named(self.function(**given, **self.options, **options))
        terms = [
            (torch.linspace(3, -1, x.numel(), device=x.device).round().view(x.shape) * x).sum()
            for x in found.values()
            if x.requires_grad
        ]
        grads = torch.autograd.grad(sum(terms), by)
        found |= {f"gradient by {name}": x for name, x in zip(self.learns, grads, strict=True)}
        return {name: x.detach().clone() for name, x in found.items()}


def named(out: Any) -> dict[str, Tensor]:
    if isinstance(out, LossOutput):
        fields = {**out._asdict(), **out.metrics}
        del fields["metrics"]
    else:
        parts = (out,) if isinstance(out, Tensor) else out
        fields = {f"output {number}": x for number, x in enumerate(parts)}
    return {name: x for name, x in fields.items() if x is not None}


def arguments(name: str, V: int = 37, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> Call:
    """`grpo_loss` with every tensor it may be given. Masked positions and 8 padding columns hold NaN."""
    spec, ref = SPECS[name]
    case = every_branch(spec, V, dtype, packed=packed, ref=ref)
    tokens = case.completion_ids.shape
    generator = torch.Generator().manual_seed(V)
    tensors: dict[str, Tensor] = {
        "logits": case.logits,
        "completion_ids": case.completion_ids.to(torch.int32 if packed else torch.int64),
        "advantages": case.advantages,
        **case.options,
        "token_weights": 0.5 + torch.rand(tokens, generator=generator),
        "temperature": 0.5 + torch.rand(tokens, generator=generator),
        "normalizer": torch.tensor(5.0),
    }
    masked = ~tensors["completion_mask"]
    for each in ("token_weights", "temperature"):
        tensors[each].masked_fill_(masked, torch.nan)
    if packed:
        tensors["completion_mask"] = tensors["completion_mask"].float()
    for each in tensors.keys() & set(ROWS):
        padding = tensors[each].new_full((*tokens, 8), torch.nan)
        tensors[each] = torch.cat([tensors[each], padding], -1)
    return Call(grpo_loss, tensors, {"spec": spec, "vocab_size": V, "return_entropy": True}, ("logits",))


def of_logps(V: int = 37, *, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    tensors = arguments("PPO", V, dtype=dtype).tensors
    given = {each: tensors[each] for each in ("logits", "temperature")}
    given |= {"ids": tensors["completion_ids"], "mask": tensors["completion_mask"]}
    return Call(selective_logps, given, {"vocab_size": V, **options}, ("logits",))


def of_rewards(*, packed: bool) -> Call:
    call = arguments("LogRatio", packed=packed)
    given = {"rewards" if name == "advantages" else name: x for name, x in call.tensors.items()}
    return Call(log_ratio_loss, given, {"vocab_size": 37}, call.learns)


def of_hidden(
    name: str, V: int = 37, *, packed: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Call:
    """`linear_grpo_loss` likewise. Masked hidden states and 8 rows of padding in the weights hold NaN.

    The logits are exact products (products.py).
    """
    call = arguments(name, V, packed=packed, dtype=dtype)
    tensors = {each: x for each, x in call.tensors.items() if each not in ROWS}
    generator = torch.Generator().manual_seed(V)
    for prefix, logits, H in ("", "logits", 6), ("ref_", "ref_logits", 9):
        if logits in call.tensors:
            shapes = {"hidden": (*tensors["completion_ids"].shape, H), "lm_head_weight": (V + 8, H)}
            for each, shape in {**shapes, "lm_head_bias": (V + 8,)}.items():
                x = on_a_grid(torch.randn(shape, generator=generator)).to(dtype)
                if each == "hidden":
                    x.masked_fill_(tensors["completion_mask"][..., None] == 0, torch.nan)
                else:
                    x[V:] = torch.nan
                tensors[prefix + each] = x
    return Call(
        linear_grpo_loss,
        tensors,
        {**call.options, "chunk_tokens": 3, **options},
        ("hidden", "lm_head_weight", "lm_head_bias"),
    )


def of_hidden_logps(V: int = 37, *, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    call = of_hidden("PPO", V, dtype=dtype)
    given = {each: x for each, x in call.tensors.items() if "hidden" in each or "lm_head" in each}
    given |= {"ids": call.tensors["completion_ids"], "mask": call.tensors["completion_mask"]}
    given["temperature"] = call.tensors["temperature"]
    function = linear_token_statistics if "top1" in options else linear_logps
    return Call(function, given, {"vocab_size": V, "chunk_tokens": 3, **options}, call.learns)


def of_log_probabilities(name: str, *, packed: bool) -> Call:
    call = arguments(name, packed=packed)
    given = {
        each: x
        for each, x in call.tensors.items()
        if each not in (*ROWS, "completion_ids", "temperature", "ref_logits")
    }
    masked = given["completion_mask"] == 0
    given["logps"] = (given["old_logps"] + 0.1).masked_fill(masked, torch.nan)
    given["entropy"] = given["old_logps"].abs()
    given["ref_logps"] = given["old_logps"] - 0.2
    return Call(policy_loss, given, {"spec": call.options["spec"]}, ("logps",))


def watching(backend: str) -> AbstractContextManager[Any]:
    """In the interpreter an address beside the elements of a kernel's tensors raises."""
    if backend != "triton" or not INTERPRETED:
        return contextlib.nullcontext()
    from benchmarks.traffic.addresses import recording

    return recording()


def assert_same(
    got: dict[str, Tensor],
    wanted: dict[str, Tensor],
    *,
    exact: bool = True,
    equal_nan: bool = False,
    sizes: dict[str, Tensor] | None = None,
    terms: dict[str, int] | None = None,
) -> None:
    """To the bit; where not `exact`, sums of fp32 may run in another order.

    sizes: of the gradients that are products, the magnitudes of what is summed; terms: how many there are.
    """
    assert got.keys() == wanted.keys()
    rtol, atol = (0.0, 0.0) if exact else (1e-4, 1e-5)
    for name, x in got.items():
        if terms is not None and sizes is not None and name in terms:
            assert_same_products(x, wanted[name], sizes[name], terms[name], name)
            continue
        torch.testing.assert_close(x, wanted[name], rtol=rtol, atol=atol, equal_nan=equal_nan, msg=name)


def of_products(call: Call, given: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """`sizes` and `terms` of `assert_same`, for a call that is given hidden states."""
    if "hidden" not in given:
        return {}
    with magnitudes():
        sizes = call.run(given, **options)
    ids = given["completion_ids" if "completion_ids" in given else "ids"]
    counts = lengths(ids.numel(), given["lm_head_weight"].shape[0]).values()
    return {
        "sizes": sizes,
        "terms": dict(zip((f"gradient by {x}" for x in call.learns), counts, strict=True)),
    }


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, device: str) -> Callable[..., None]:
    """Runs a call on its tensors by themselves, then amid poison."""
    chunks: list[Tensor] = []
    buffer = Chunks.buffer

    def kept(self: Chunks, dtype: torch.dtype) -> Tensor:
        chunks.append(buffer(self, dtype))
        return chunks[-1]

    def check(
        call: Call,
        backend: str | None = None,
        *,
        inplace: bool = False,
        aligned: bool | None = None,
        wrong: bool = False,
    ) -> None:
        """`wrong`: an id is, and the loss NaN."""
        options: dict[str, Any] = {} if backend is None else {"backend": backend}
        options |= {"inplace": True} if inplace else {}
        tensors = {name: x.to(device) for name, x in call.tensors.items()}

        def layout(name: str) -> bool | None:
            return aligned if name in ROWS else None

        given = {name: contiguous_copy(x, aligned=layout(name)) for name, x in tensors.items()}
        leaves = {}
        if inplace:
            leaves["logits"] = tensors["logits"].clone().requires_grad_()
            given["logits"] = contiguous_copy(leaves["logits"], aligned=aligned)
        wanted = call.run(given, leaves, **options)
        products = of_products(call, given, **options)

        placed = {
            name: Surrounded.of(x, dense=name in ROWS + HEADS, aligned=layout(name))
            for name, x in tensors.items()
        }
        before = {name: x.buffer.clone() for name, x in placed.items()}
        given, written = {name: x.view for name, x in placed.items()}, torch.empty(0)
        if inplace:
            leaves["logits"] = placed["logits"].buffer.requires_grad_()
            written = leaves["logits"].clone()
            given["logits"] = placed["logits"].within(written)
        versions = {name: x.buffer._version for name, x in placed.items()}
        allocations = Allocations(monkeypatch)
        monkeypatch.setattr(Chunks, "buffer", kept)
        with watching(backend or "") as seen:
            got = call.run(given, leaves, **options)

        if inplace:
            logits, grad = placed["logits"], got["gradient by logits"]
            got["gradient by logits"] = logits.within(grad)
            assert not logits.beside(grad).any()
            assert torch.equal(bits(logits.within(written)), bits(logits.within(grad)))
            assert torch.equal(bits(logits.beside(written)), bits(logits.beside(before["logits"])))
        # On a GPU what PyTorch adds up, it adds up by alignment.
        exact = device == "cpu" or (backend == "triton" and "hidden" not in tensors)
        assert_same(got, wanted, exact=exact, equal_nan=wrong, **products)
        assert got["loss" if "loss" in got else "output 0"].isnan().any() == wrong
        for name, x in placed.items():
            assert torch.equal(bits(x.buffer), bits(before[name])), f"{name} or what surrounds it has changed"
            assert x.buffer._version == versions[name], f"{name} was written by an operator"
            assert seen is None or not seen.writes(x.buffer).any(), f"{name} was written by a kernel"
        allocations.check()
        for x in chunks:
            assert x._base is not None
            assert x._base[:, x.shape[1] :].isnan().all(), "padding of a chunk was written"

    return check


class TestPoisonAroundEveryTensor:
    """The results are those of contiguous tensors; inputs and all around them keep their bits."""

    @both_layouts
    @specs
    def test_from_logits(self, check: Any, backend: str, name: str, packed: bool) -> None:
        check(arguments(name, packed=packed), backend)

    @both_layouts
    @specs
    def test_in_place(self, check: Any, backend: str, name: str, packed: bool) -> None:
        check(arguments(name, packed=packed), backend, inplace=True)

    @both_layouts
    def test_log_ratio_loss(self, check: Any, backend: str, packed: bool) -> None:
        check(of_rewards(packed=packed), backend)

    @specs
    @pytest.mark.parametrize("packed, compact", [(False, True), (False, False), (True, True)])
    def test_from_hidden_states(
        self, check: Any, backend: str, name: str, packed: bool, compact: bool
    ) -> None:
        check(of_hidden(name, packed=packed, compact=compact), backend)

    @both_layouts
    def test_skip_inactive(self, check: Any, backend: str, packed: bool) -> None:
        check(of_hidden("PPO", packed=packed, skip_inactive=True), backend)

    @pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
    def test_selective_logps(self, check: Any, backend: str, entropy: bool) -> None:
        check(of_logps(return_entropy=entropy), backend)

    @pytest.mark.parametrize("compact", [True, False])
    def test_linear_logps(self, check: Any, backend: str, compact: bool) -> None:
        check(of_hidden_logps(return_entropy=True, compact=compact), backend)
        check(of_hidden_logps(entropy=True, top1=True, compact=compact), backend)

    @both_layouts
    @pytest.mark.parametrize(
        "name", [name for name in SPECS if name not in ("exact KL, entropy", "forward KL")]
    )
    def test_policy_loss(self, check: Any, name: str, packed: bool) -> None:
        check(of_log_probabilities(name, packed=packed))


KERNELS = {
    "row_stats": of_logps,
    "row_stats, entropy": lambda *size, **how: of_logps(*size, return_entropy=True, **how),
    "row_stats, top1": lambda *size, **how: of_hidden_logps(*size, entropy=True, top1=True, **how),
    "row_stats, dlogits, reference": lambda *size, **how: arguments("exact KL, entropy", *size, **how),
    "row_stats, dlogits, forward KL": lambda *size, **how: arguments("forward KL", *size, **how),
}
sizes = pytest.mark.parametrize(
    "V, aligned",
    [(37, False), (128, False), (300, False), (512, True), (516, True)],
    ids=["below a block", "a block", "a block and more", "a block, aligned", "a block and more, aligned"],
)


@pytest.mark.usefixtures("needs_triton")
class TestEveryKernel:
    """Rows that 16-byte loads may take are cut into blocks of 512 and more, others of 128 and more."""

    @sizes
    @pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
    def test_two_steps(self, check: Any, make: Callable[..., Call], V: int, aligned: bool) -> None:
        check(make(V), "triton", aligned=aligned)

    @sizes
    @pytest.mark.parametrize("name", ["exact KL, entropy", "forward KL", "k3"])
    def test_fused_and_scale_rows(self, check: Any, name: str, V: int, aligned: bool) -> None:
        check(arguments(name, V), "triton", aligned=aligned, inplace=True)

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    @pytest.mark.parametrize(
        "V, dtype",
        [(1024 + 40, torch.bfloat16), (2 * 256 + 88, torch.float64)],
        ids=["bf16", "fp64"],
    )
    def test_blocks_and_a_rest_under_a_softcap(
        self, check: Any, V: int, dtype: torch.dtype, inplace: bool
    ) -> None:
        call = arguments("exact KL, entropy", V, dtype=dtype)
        call.options["logit_softcap"] = 20.0
        check(call, "triton", aligned=True, inplace=inplace)


def bare(shape: tuple[int, ...], V: int, *, hidden: bool = False) -> Call:
    """Random tensors, nothing masked; packed where `shape` is one number."""
    generator = torch.Generator().manual_seed(V)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "completion_ids": torch.randint(V, shape, generator=generator),
        "advantages": normal(*shape),
        "old_logps": normal(*shape) - 3,
    }
    options: dict[str, Any] = {"spec": SPECS["exact KL, entropy"][0]}
    if not hidden:
        logits = {"logits": normal(*shape, V), "ref_logits": normal(*shape, V)}
        return Call(grpo_loss, logits | tensors, options, ("logits",))
    sizes = {"hidden": (*shape, 6), "lm_head_weight": (V, 6)}
    ref_sizes = {"ref_hidden": (*shape, 9), "ref_lm_head_weight": (V, 9)}
    head, ref = ({each: on_a_grid(normal(*x)) for each, x in of.items()} for of in (sizes, ref_sizes))
    head["lm_head_bias"] = normal(V)
    return Call(linear_grpo_loss, head | ref | tensors, {**options, "chunk_tokens": 4}, tuple(head))


class TestExtremes:
    @pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3), (1,), (0,), (3, 2)], ids=str)
    @pytest.mark.parametrize("V", [1, 37])
    @pytest.mark.parametrize("form", ["two steps", "in place", "hidden states"])
    def test_sizes(self, check: Any, backend: str, shape: tuple[int, ...], V: int, form: str) -> None:
        check(bare(shape, V, hidden=form == "hidden states"), backend, inplace=form == "in place")

    @pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
    @pytest.mark.parametrize("compact", [True, False])
    def test_chunks(self, check: Any, backend: str, chunk_tokens: int, compact: bool) -> None:
        """Of 12 tokens."""
        check(of_hidden("exact KL, entropy", chunk_tokens=chunk_tokens, compact=compact), backend)

    @pytest.mark.parametrize("wrong", [-1, 40, 2**63 - 1])
    @pytest.mark.parametrize("form", ["two steps", "in place", "compact", "in their places"])
    def test_wrong_ids(self, check: Any, backend: str, wrong: int, form: str) -> None:
        """Of 45 columns 37 are words: 40 could be read, but is none."""
        if form in ("two steps", "in place"):
            call = arguments("exact KL, entropy")
        else:
            call = of_hidden("exact KL, entropy", compact=form == "compact")
        call.tensors["completion_ids"][1, 0] = wrong
        check(call, backend, inplace=form == "in place", wrong=True)

    @pytest.mark.parametrize("of", ["batch", "time", "both"])
    def test_expanded_logits(self, backend: str, device: str, of: str) -> None:
        """Rows that lie in the same memory are read as rows of their own."""
        # Rows at one address count as aligned, and aligned rows are summed in another order than others.
        vocab = 40 if of == "both" else 37
        call = bare((2, 3), vocab)
        call = call._replace(tensors={name: x.to(device) for name, x in call.tensors.items()})
        cut = {"batch": (slice(1), slice(3)), "time": (slice(2), slice(1)), "both": (slice(1), slice(1))}[of]
        expanded = {name: x[cut].expand(2, 3, vocab) for name, x in call.tensors.items() if name in ROWS}
        alone = {name: x.contiguous() for name, x in expanded.items()}
        with watching(backend):
            got = call.run({**call.tensors, **expanded}, backend=backend)
        want = call.run({**call.tensors, **alone}, backend=backend)
        assert_same(got, want, exact=device == "cpu" or backend == "triton")

    @pytest.mark.parametrize(
        "name, layout",
        [
            ("hidden", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
            ("hidden", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
            ("hidden", lambda x: x[:1].expand(2, 3, 6)),
            ("hidden", lambda x: x[..., :1].expand(2, 3, 6)),
            ("hidden", lambda x: Surrounded.of(x, dense=False).view),
            ("lm_head_weight", lambda x: x.t().contiguous().t()),
            ("lm_head_weight", lambda x: x[:, :1].expand(37, 6)),
            ("lm_head_weight", lambda x: Surrounded.of(x, dense=False).view),
            ("lm_head_bias", lambda x: x[:1].expand(37)),
        ],
    )
    def test_layouts_of_heads(
        self, backend: str, device: str, name: str, layout: Callable[[Tensor], Tensor]
    ) -> None:
        """The gradients to rounding: a product may sum in another order for each layout."""
        call = bare((2, 3), 37, hidden=True)
        call = call._replace(tensors={each: x.to(device) for each, x in call.tensors.items()})
        view = layout(call.tensors[name])
        with watching(backend):
            got = call.run({**call.tensors, name: view}, backend=backend)
        given = {**call.tensors, name: view.detach().contiguous()}
        want, products = call.run(given, backend=backend), of_products(call, given, backend=backend)
        assert_same(got, want, exact=device == "cpu", **products)

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    def test_offsets_beyond_2_31(
        self, backend: str, device: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Sequences 2^31 elements apart, in memory that is reserved but never touched."""
        if device != "cpu":
            pytest.skip("a GPU's memory is not reserved without being used: test_hard_cases.py fills it")
        if backend == "triton":
            from triton.runtime.interpreter import GridExecutor

            # It would copy the storages of all arguments onto themselves.
            monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
        call, apart = bare((2, 3), 40), 2**31 + 64
        try:
            storage = torch.UntypedStorage(2 * (apart + 1024))
        except RuntimeError as error:
            pytest.skip(str(error))
        near = {**call.tensors, **{name: call.tensors[name].bfloat16() for name in ROWS}}
        far = {
            name: near[name].new_empty(0).set_(storage, offset, (2, 3, 40), (apart, 48, 1)).copy_(near[name])
            for name, offset in zip(ROWS, (64, 512), strict=True)
        }
        outcomes = []
        for given in near, {**near, **far}:
            leaves = {}
            if inplace:
                # Which makes the logits a result, and leaves them where they lie.
                leaves["logits"] = torch.zeros((), requires_grad=True)
                given["logits"].add_(leaves["logits"])
            outcomes.append(call.run(given, leaves, backend=backend, inplace=inplace))
            if inplace:
                outcomes[-1]["gradient by logits"] = given["logits"].detach().contiguous()
        assert outcomes[0]["gradient by logits"].any()
        assert_same(*outcomes)


# Memory of one tensor for the logits and the reference's: rows of one in another's place, or in part.
OVERLAPPING: dict[str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "a token ahead": ((2, 4, 37), lambda x: (x[:, :-1], x[:, 1:])),
    "a token behind": ((2, 4, 37), lambda x: (x[:, 1:], x[:, :-1])),
    "a column ahead": ((2, 3, 38), lambda x: (x[..., :-1], x[..., 1:])),
    "a column behind": ((2, 3, 38), lambda x: (x[..., 1:], x[..., :-1])),
    "transposed": ((3, 3, 37), lambda x: (x, x.transpose(0, 1))),
    "expanded": ((2, 3, 37), lambda x: (x, x[:1].expand(2, 3, 37))),
}
APART: dict[str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "the same": ((2, 3, 37), lambda x: (x, x)),
    "halves": ((4, 3, 37), lambda x: (x[:2], x[2:])),
    "by turns": ((2, 3, 2, 37), lambda x: (x[:, :, 1], x[:, :, 0])),
    "side by side": ((2, 3, 74), lambda x: (x[..., :37], x[..., 37:])),
}
both_steps = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["forward", "backward"])
"""When the gradient is written: fp16 waits for the backward."""
EXACT = LossSpec(PPOClip(), KL("exact"))


class TestMisuse:
    """Whatever autograd can see raises, and what shares memory with the logits is told apart."""

    @pytest.fixture(autouse=True)
    def a_chunk_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("grpo_kernels.row_chunks.CPU_CHUNK_ELEMENTS", 37)

    @staticmethod
    def loss(logits: Tensor, backend: str, **options: Any) -> Tensor:
        tensors = bare(tuple(logits.shape[:-1]), 37).tensors
        given = {name: x.to(logits.device) for name, x in tensors.items() if name not in ROWS}
        return grpo_loss(logits, **given, backend=backend, **options).loss

    @staticmethod
    def leaf(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape or (2, 3, 37), generator=generator).to(device, dtype).requires_grad_()

    @both_steps
    @pytest.mark.parametrize("name", OVERLAPPING)
    def test_reference_in_the_memory_of_other_rows(
        self, backend: str, device: str, name: str, dtype: torch.dtype
    ) -> None:
        shape, views = OVERLAPPING[name]
        memory = self.leaf(device, dtype, *shape).clone()
        before = memory.detach().clone()
        logits, ref_logits = views(memory)
        with pytest.raises(ValueError, match="inplace=True would overwrite ref_logits"):
            self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT, inplace=True)
        assert torch.equal(memory, before)
        self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT).backward()

    @both_steps
    @pytest.mark.parametrize("name", APART)
    def test_reference_in_the_same_memory(
        self, backend: str, device: str, name: str, dtype: torch.dtype
    ) -> None:
        shape, views = APART[name]
        grads = []
        for inplace in (False, True):
            leaf = self.leaf(device, dtype, *shape)
            logits, ref_logits = views(leaf.clone())
            loss = self.loss(logits, backend, ref_logits=ref_logits, spec=EXACT, inplace=inplace)
            grads += torch.autograd.grad(loss, leaf)
        assert grads[0].any() or name == "the same"
        # Where terms cancel the two sum in other orders.
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

    @both_steps
    def test_leaf_that_is_a_view(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """Of a tensor that requires no gradient."""
        memory = self.leaf(device, dtype).detach()
        before = memory.clone()
        with pytest.raises(RuntimeError, match=r"inplace.*leaf"):
            self.loss(memory[:].requires_grad_(), backend, inplace=True)
        assert torch.equal(memory, before)

    def test_one_of_several_views(self, backend: str, device: str) -> None:
        """Autograd knows no in-place operation on what `chunk` returns."""
        logits, _ = self.leaf(device, torch.float32, 4, 3, 37).clone().chunk(2)
        with pytest.raises(RuntimeError, match="multiple views"):
            self.loss(logits, backend, inplace=True).backward()

    @both_steps
    @pytest.mark.parametrize(
        "write", [lambda x: x.zero_(), lambda x: x.detach()[0].zero_()], ids=["", "a part"]
    )
    def test_logits_written_before_the_backward(
        self, backend: str, device: str, dtype: torch.dtype, write: Callable[[Tensor], Tensor]
    ) -> None:
        logits = self.leaf(device, dtype).clone()
        loss = self.loss(logits, backend, inplace=True)
        write(logits)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()

    @both_steps
    def test_two_losses_of_the_same_logits(self, backend: str, device: str, dtype: torch.dtype) -> None:
        logits = self.leaf(device, dtype).clone()
        losses = [self.loss(logits, backend, inplace=True) for _ in range(2)]
        with pytest.raises(RuntimeError, match=IN_PLACE):
            sum(losses).backward()

    def other_use(self, logits: Tensor, backend: str) -> Tensor:
        """Whose backward reads the logits."""
        ids = torch.zeros(2, 3, dtype=torch.long, device=logits.device)
        logps = selective_logps(logits, ids, backend=backend)
        assert isinstance(logps, Tensor)
        return logps.sum()

    @both_steps
    def test_another_use_before(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """Its backward raises from when on the gradient is written."""
        logits = self.leaf(device, dtype).clone()
        other = self.other_use(logits, backend)
        loss = self.loss(logits, backend, inplace=True)
        if dtype == torch.float16:
            other.backward(retain_graph=True)
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            other.backward()

    @both_steps
    def test_another_use_after(self, backend: str, device: str, dtype: torch.dtype) -> None:
        """What it finds nobody can know; but where it finds something else in its backward, that raises."""
        logits = self.leaf(device, dtype).clone()
        loss = self.loss(logits, backend, inplace=True)
        other = self.other_use(logits, backend)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=IN_PLACE):
            other.backward()

    @pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
    @pytest.mark.parametrize("kl", [None, KL("exact")], ids=["LogRatio", "exact KL"])
    def test_reference_written_before_the_backward(
        self, backend: str, device: str, inplace: bool, kl: KL | None
    ) -> None:
        """It raises where the backward reads the reference, and changes nothing where it does not."""
        grads = []
        for write in (False, True):
            leaf, ref_logits = self.leaf(device, torch.float32), self.leaf(device, torch.float32).detach() / 2
            given = {"ref_logits": ref_logits, "spec": LossSpec(LogRatio(), kl), "inplace": inplace}
            loss = self.loss(leaf.clone(), backend, **given)
            if write:
                ref_logits.zero_()
            if write and kl and not inplace:
                with pytest.raises(RuntimeError, match=IN_PLACE):
                    loss.backward()
                return
            grads += torch.autograd.grad(loss, leaf)
        assert torch.equal(*grads)

    @pytest.mark.parametrize("name", ["hidden", "lm_head_weight"])
    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_head_written_before_the_backward(self, backend: str, device: str, name: str, level: str) -> None:
        """As an optimizer's step would: the gradient is made before or the backward raises."""
        call = bare((2, 3), 37, hidden=True)
        given = {each: x.to(device) for each, x in call.tensors.items()}
        leaves = [given[each].requires_grad_() for each in call.learns]
        options = {"spec": LossSpec(PPOClip(), level=level), "backend": backend}
        want, loss = (linear_grpo_loss(**given, **options).loss for _ in range(2))
        grads = torch.autograd.grad(want, leaves)
        with magnitudes():
            sizes = torch.autograd.grad(linear_grpo_loss(**given, **options).loss, leaves)
        with torch.no_grad():
            given[name].mul_(2)
        if level == "token":
            found = zip(call.learns, torch.autograd.grad(loss, leaves), grads, sizes, strict=True)
            for terms, (each, x, y, size) in zip(lengths(6, 37).values(), found, strict=True):
                assert_same_products(x, y, size, terms, each)
            return
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()


@NEEDS_DYNAMO
class TestMisuseInAGraph:
    """Under torch.compile, which makes two steps and copies of its own."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Not here: Dynamo cannot look into an allocation that fills what it allocates."""
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "view",
        [lambda x: x[:, :-1], lambda x: x[:1].expand(2, 4, 37)],
        ids=["a view", "expanded"],
    )
    @pytest.mark.parametrize("inside", [True, False])
    def test_views(self, device: str, view: Callable[[Tensor], Tensor], inside: bool) -> None:
        """Made in the graph or outside: the gradient of the same loss in two steps, or an error."""
        leaf = TestMisuse.leaf(device, torch.float32, 2, 4, 37)
        tensors = bare(tuple(view(leaf).shape[:-1]), 37).tensors
        given = {name: x.to(device) for name, x in tensors.items() if name not in ROWS}

        def loss(x: Tensor, inplace: bool) -> Tensor:
            return grpo_loss(view(x) if inside else x, **given, backend="torch", inplace=inplace).loss

        def gradient(call: Callable[..., Tensor], inplace: bool) -> Tensor:
            x = leaf.clone()
            return torch.autograd.grad(call(x if inside else view(x), inplace), leaf)[0]

        want = gradient(loss, False)
        try:
            got = gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), True)
        except ValueError as error:
            assert "rows of their own" in str(error)
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


class TestTheseTestsCanFail:
    @staticmethod
    def stray(which: str) -> Callable[..., Any]:
        """Log-probabilities, and a step beyond the first row wherever there is something beyond."""

        def function(logits: Tensor, **options: Any) -> Any:
            if which == "allocation":
                new = torch.empty(4)
                new.as_strided((1,), (1,), new.storage_offset() + 4).zero_()
            found = selective_logps(logits, **options)
            beyond = logits.data.as_strided((1,), (1,), logits.storage_offset() + logits.shape[-1])
            if which == "read":
                return found + 0 * beyond
            if which == "write" and not logits.is_contiguous():
                beyond.data.zero_()
            return found

        return function

    @pytest.mark.parametrize(
        "which, message",
        [
            ("read", "output 0"),
            ("write", "logits or what surrounds it has changed"),
            ("allocation", "written behind an allocation of 4 elements"),
        ],
    )
    def test_on_what_strays(self, check: Any, which: str, message: str) -> None:
        call = of_logps()
        check(call._replace(function=self.stray("nowhere")), "torch")
        with pytest.raises(AssertionError, match=message):
            check(call._replace(function=self.stray(which)), "torch")

    @pytest.mark.skipif(not INTERPRETED, reason="addresses are seen in Triton's interpreter")
    def test_on_an_address_beyond_a_row(self) -> None:
        """Of rows 36 wide, which a kernel is told are 37."""
        from grpo_kernels.kernels.fused import scale_rows_kernel

        x = torch.randn(1, 2, 40)[..., :36]
        with watching("triton"), pytest.raises(Exception, match="1 reads beside the elements of a tensor"):
            scale_rows_kernel[(2,)](x, 80, 40, torch.tensor(2.0), 2, 37, BLOCK=128, GROUP=1)
