"""The adapted modules against unmerged PEFT in fp64, on a tiny network of every kind of site."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from kernels.ops import get_backend
from kernels.types import TABLE_COLUMNS, Segments, SiteGroup, SlotWeights
from server.adapters.layer import AdaptedEmbedding, AdaptedLinear, StepState, pack

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # PEFT advises against merging; nobody merges

VOCAB, HIDDEN, INNER = 50, 24, 40
SITES = ["embed", "q", "k", "v", "o", "gate", "up", "down", "head"]
ROW = {name: row for row, name in enumerate(SITES)}
NUM_SLOTS = 6


class Net(nn.Module):
    """Row-wise, so that each row of a batch has its own oracle. `rows` picks what the head sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.k = nn.Linear(HIDDEN, 8)
        self.v = nn.Linear(HIDDEN, 8)
        self.o = nn.Linear(HIDDEN + 16, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.o(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).tanh())
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x if rows is None else x[..., rows, :])


class World:
    """A base, its adapters as PEFT has them (fp64), and the same adapters in slots 1, 2, ..."""

    def __init__(self, backend: str = "torch", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.base = Net()
        self.peft = []
        self.dtype = dtype
        self.elements: list[torch.Tensor] = [torch.full((8,), torch.nan)]  # what lies around is never read
        self.num_elements = 8
        self.table = torch.zeros(NUM_SLOTS, len(SITES), TABLE_COLUMNS, dtype=torch.int64)
        self.table[..., 2] = -1
        for slot, (rank, targets, has_bias) in enumerate(
            [(3, SITES, False), (8, ["q", "v", "down"], True), (11, ["k", "up", "head"], False), (1, ["embed"], False)],
            start=1,
        ):
            self.add(slot, rank, targets, has_bias)
        arena = torch.cat([part.reshape(-1) for part in self.elements]).to(dtype)
        self.step = StepState(SlotWeights(arena, self.table), get_backend(backend))

    def add(self, slot: int, rank: int, targets: list[str], has_bias: bool) -> None:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets, lora_bias=has_bias, init_lora_weights=False
        )
        model = get_peft_model(copy.deepcopy(self.base), config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_()
        self.peft.append(model)
        for target in targets:
            layer = getattr(model.base_model.model, target)
            scale = layer.scaling["default"]
            if target == "embed":
                a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"] * scale
                self.install(slot, target, a, b, None, rank, is_embedding=True)
            else:
                lora_b = layer.lora_B["default"]
                bias = lora_b.bias * scale if has_bias else None
                self.install(slot, target, layer.lora_A["default"].weight, lora_b.weight * scale, bias, rank)

    def install(self, slot, target, a, b, bias, rank, is_embedding=False) -> None:
        stride = -(-rank // 8) * 8
        a_padded = torch.zeros(a.shape[0], stride) if is_embedding else torch.zeros(stride, a.shape[1])
        a_padded[: a.shape[0], : a.shape[1]] = a.detach()
        b_padded = torch.zeros(b.shape[0], stride)
        b_padded[:, :rank] = b.detach()
        offsets = [self.put(a_padded), self.put(b_padded), -1 if bias is None else self.put(bias.detach().float())]
        self.table[slot, ROW[target]] = torch.tensor([*offsets, rank, stride])

    def put(self, tensor: torch.Tensor) -> int:
        offset = self.num_elements
        for part in (tensor, torch.full((-tensor.numel() % 64 + 64,), torch.nan)):
            self.elements.append(part)
            self.num_elements += part.numel()
        return offset

    def adapted(self, *, is_packed: bool = True) -> Net:
        net = copy.deepcopy(self.base).to(self.dtype).eval()
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",), ("head",)):
            bases = [getattr(net, name) for name in names]
            if len(bases) > 1 and is_packed:
                stubs = pack(bases, group_of(names, bases), self.step)
            else:
                stubs = [
                    AdaptedLinear(base, group_of([name], [base]), self.step, "head" if name == "head" else "body")
                    for name, base in zip(names, bases, strict=True)
                ]
            for name, stub in zip(names, stubs, strict=True):
                setattr(net, name, stub)
        net.embed = AdaptedEmbedding(net.embed, ROW["embed"], self.step)
        return net

    def set_slots(self, slots: list[int], rows: list[int] | None = None) -> None:
        self.step.segments = segments_of_rows(slots)
        self.step.head_segments = segments_of_rows(slots if rows is None else [slots[row] for row in rows])

    def oracle(self, slot: int, ids: torch.Tensor) -> torch.Tensor:
        model = self.peft[slot - 1] if slot else copy.deepcopy(self.base).double()
        with torch.no_grad():
            return model(ids)


def group_of(names, bases) -> SiteGroup:
    widths = [base.nf if isinstance(base, Conv1D) else base.out_features for base in bases]
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    k = bases[0].nx if isinstance(bases[0], Conv1D) else bases[0].in_features
    return SiteGroup(tuple(ROW[name] for name in names), tuple(offsets), tuple(widths), k)


def segments_of_rows(slots: list[int]) -> Segments:
    segments = Segments()
    for row, slot in enumerate(slots):
        if not slot:
            continue
        if segments.ends and segments.ends[-1] == row and segments.members[-1] == ((slot, 1.0),):
            segments.ends[-1] = row + 1
        else:
            segments.starts.append(row)
            segments.ends.append(row + 1)
            segments.members.append(((slot, 1.0),))
    return segments


SLOTS = [1, 1, 0, 2, 3, 3, 3, 3, 3, 3, 3, 0, 4, 1, 0, 2, 2]
IDS = torch.arange(len(SLOTS)) * 7 % VOCAB


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("batched", [True, False], ids=["[1, T]", "[T]"])
def test_each_row_of_a_mixed_batch_equals_peft(backend, is_packed, batched):
    world = World(backend)
    net = world.adapted(is_packed=is_packed)
    world.set_slots(SLOTS)
    with torch.inference_mode():
        logits = net(IDS[None] if batched else IDS)
    assert logits.shape == ((1,) if batched else ()) + (len(SLOTS), VOCAB)
    logits = logits.reshape(len(SLOTS), VOCAB).double()
    for slot in set(SLOTS):
        rows = [row for row, held in enumerate(SLOTS) if held == slot]
        torch.testing.assert_close(logits[rows], world.oracle(slot, IDS[rows]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_packed", [True, False])
def test_base_rows_are_bit_for_bit_those_of_a_batch_without_adapters(is_packed):
    world = World()
    net = world.adapted(is_packed=is_packed)
    with torch.inference_mode():
        alone = net(IDS[None])
        world.set_slots(SLOTS)
        mixed = net(IDS[None])
    base_rows = [row for row, slot in enumerate(SLOTS) if slot == 0]
    assert torch.equal(mixed[0, base_rows], alone[0, base_rows])
    others = [row for row, slot in enumerate(SLOTS) if slot]
    assert (mixed[0, others] != alone[0, others]).any(dim=-1).all(), "a row has lost its adapter"


def test_the_head_has_its_own_plan():
    world = World()
    net = world.adapted()
    rows = [1, 2, 6, 10, 12, 16]
    world.set_slots(SLOTS, rows)
    with torch.inference_mode():
        logits = net(IDS[None], torch.tensor(rows))[0].double()
    for index, row in enumerate(rows):
        wanted = world.oracle(SLOTS[row], IDS[row : row + 1])[0]
        torch.testing.assert_close(logits[index], wanted, rtol=1e-5, atol=1e-5)


def test_bf16_adds_one_rounding():
    world = World(dtype=torch.bfloat16)
    net = world.adapted()
    world.set_slots(SLOTS)
    with torch.inference_mode():
        logits = net(IDS[None])[0]
    assert logits.dtype == torch.bfloat16
    for slot in set(SLOTS):
        rows = [row for row, held in enumerate(SLOTS) if held == slot]
        wanted = world.oracle(slot, IDS[rows])
        assert (logits[rows].double() - wanted).norm() < 0.03 * wanted.norm()


class NoOps:
    """A backend that must not be reached."""

    def segmented_lora(self, *_) -> None:
        raise AssertionError("called without a segment")

    segmented_embedding = segmented_lora


@pytest.mark.parametrize("empty", [None, Segments()])
def test_a_step_without_adapters_calls_no_kernel_and_equals_the_base(empty):
    world = World()
    world.step.ops = NoOps()
    world.step.segments = world.step.head_segments = empty
    with torch.inference_mode():
        unpacked = world.adapted(is_packed=False)(IDS[None])
        packed = world.adapted()(IDS[None])
        wanted = world.base(IDS[None])
    assert torch.equal(unpacked, wanted)
    torch.testing.assert_close(packed, wanted)


def test_inputs_and_weights_are_not_written_to():
    world = World()
    net = world.adapted()
    world.set_slots(SLOTS)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    x = torch.randn(1, len(SLOTS), HIDDEN)
    kept = x.clone()
    with torch.inference_mode():
        net(IDS[None])
        net.q(x), net.k(x), net.v(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_inputs_of_any_stride():
    world = World()
    layer = world.adapted().o
    world.set_slots(SLOTS)
    x = torch.randn(1, layer.in_features, len(SLOTS)).transpose(1, 2)
    assert x.stride(-1) != 1
    with torch.inference_mode():
        assert torch.allclose(layer(x), layer(x.contiguous()), atol=1e-6)


# --- packing ------------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> Net:
    return World().adapted()


def test_slices_of_another_input_or_out_of_turn_are_errors(net):
    x, other = torch.randn(2, 1, 3, HIDDEN)
    with pytest.raises(RuntimeError, match="must run unpacked"):
        net.k(x)  # nothing has run
    net.q(x)
    with pytest.raises(RuntimeError, match="slice 1"):
        net.k(other)
    with pytest.raises(RuntimeError, match="slice 1"):
        net.k(x.clone())  # equal values are not enough: who knows what else differs
    with pytest.raises(RuntimeError, match="slice 2"):
        net.v(x)
    net.k(x)
    with pytest.raises(RuntimeError, match="slice 1"):
        net.k(x)
    net.v(x)
    with pytest.raises(RuntimeError, match="slice 2"):
        net.v(x)
    q = net.q(other)  # after whatever went wrong, a new first slice starts afresh
    assert torch.equal(q, net.q(other)) and net.k(other) is not None


def test_results_are_let_go_with_the_last_slice(net):
    x = torch.randn(1, 3, HIDDEN)
    whole = weakref.ref(net.q(x)._base)
    assert whole() is not None
    net.k(x)
    assert whole() is not None
    net.v(x)
    gc.collect()
    assert whole() is None
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_packing_leaves_one_copy_of_the_weights():
    world = World()
    base = copy.deepcopy(world.base)
    originals = [weakref.ref(getattr(base, name).weight) for name in ("q", "k", "v")]
    values = torch.cat([getattr(base, name).weight.detach().clone() for name in ("q", "k", "v")])
    bases = [base.q, base.k, base.v]
    base.q, base.k, base.v = pack(bases, group_of(["q", "k", "v"], bases), world.step)
    del bases
    gc.collect()
    assert [reference() for reference in originals] == [None] * 3
    packed = base.q.packed
    assert torch.equal(packed.weight, values) and not packed.weight.requires_grad
    for name in ("q", "k", "v"):
        weight = getattr(base, name).weight
        assert weight.untyped_storage().data_ptr() == packed.weight.untyped_storage().data_ptr()
    assert sum(p.numel() for p in base.parameters()) == sum(p.numel() for p in world.base.parameters())
    assert [name for name in base.state_dict() if name[0] in "qkv"] == ["q.packed.weight", "q.packed.bias"]


def test_a_group_in_which_only_some_have_a_bias():
    world = World()
    bases = [nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 8, bias=False), nn.Linear(HIDDEN, 8)]
    stubs = pack(bases, group_of(["q", "k", "v"], bases), world.step)
    x = torch.randn(2, HIDDEN)
    with torch.inference_mode():
        for base, stub in zip(bases, stubs, strict=True):
            torch.testing.assert_close(stub(x), base(x))


def test_what_model_code_reads_off_a_module_is_still_there(net):
    base = World().base
    for name in ("q", "k", "v", "o", "gate", "down", "head"):
        stub, was = getattr(net, name), getattr(base, name)
        assert torch.equal(stub.weight, was.weight) and stub.weight.dtype == was.weight.dtype
        assert (stub.in_features, stub.out_features) == (was.in_features, was.out_features)
        assert (stub.bias is None) == (was.bias is None)
        assert was.bias is None or torch.equal(stub.bias, was.bias)
    assert torch.equal(net.embed.weight, base.embed.weight)
    assert (net.embed.num_embeddings, net.embed.embedding_dim, net.embed.padding_idx) == (VOCAB, HIDDEN, None)
    with pytest.raises(AttributeError):
        net.o.no_such_thing  # noqa: B018


def test_views_follow_a_change_of_dtype(net):
    net.to(torch.bfloat16)
    assert net.k.weight.dtype == torch.bfloat16
    assert net.k.weight.untyped_storage().data_ptr() == net.q.packed.weight.untyped_storage().data_ptr()


def test_a_tied_head_keeps_the_one_parameter():
    world = World()
    base = copy.deepcopy(world.base)
    base.head.weight = base.embed.weight
    embed = AdaptedEmbedding(base.embed, ROW["embed"], world.step)
    head = AdaptedLinear(base.head, group_of(["head"], [base.head]), world.step, "head")
    assert head.weight is embed.weight is base.embed.weight


# --- other bases --------------------------------------------------------------------------------------------


def test_a_base_that_stores_its_weight_transposed():
    world = World()
    base = Conv1D(HIDDEN, HIDDEN)
    layer = AdaptedLinear(base, group_of(["q"], [base]), world.step)
    linear = nn.Linear(HIDDEN, HIDDEN)
    linear.weight.data, linear.bias.data = base.weight.data.T.contiguous(), base.bias.data
    twin = AdaptedLinear(linear, group_of(["q"], [linear]), world.step)
    world.set_slots(SLOTS)
    x = torch.randn(1, len(SLOTS), HIDDEN)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), twin(x))
        assert not torch.equal(layer(x), base(x))


def test_an_embedding_that_scales_its_output():
    """Gemma's: the compiler folds the scale into B, so the delta is added after it."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    world = World()
    base = Gemma3TextScaledWordEmbedding(VOCAB, HIDDEN, 0, embed_scale=3.0)
    layer = AdaptedEmbedding(base, ROW["embed"], world.step)
    plain = AdaptedEmbedding(nn.Embedding(VOCAB, HIDDEN), ROW["embed"], world.step)
    world.set_slots(SLOTS)
    with torch.inference_mode():
        delta = plain(IDS[None]) - plain.base(IDS[None])
        torch.testing.assert_close(layer(IDS[None]), 3.0 * base.weight[IDS][None] + delta)
    assert layer.embed_scale == 3.0 and layer.padding_idx == 0
