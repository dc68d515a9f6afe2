"""A whole engine core around a model of one matrix, on any device, and copies that take as long as they may."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from server.adapters.layer import StepState
from server.adapters.slots import AdapterSlots
from server.engine.batch import BatchBuilder
from server.engine.blocks import BlockPool
from server.engine.core import EngineCore
from server.engine.limits import SchedulerLimits
from server.engine.messages import AddRequest, RequestOutput, SamplingParams
from server.engine.scheduler import Scheduler
from server.model.copies import Copies, CpuCopies, Ring
from server.model.forward import StepInputs
from server.model.runner import ModelRunner
from server.model.sampler import Largest, largest
from tests.unit.byte_device import PAGE, ByteDevice

VOCAB, BLOCK_SIZE, EOS, BROKEN = 96, 4, 5, 7


class Matrix:
    """A forward pass whose logits depend on a row's own token alone; those behind BROKEN are NaN."""

    def __init__(self, device: torch.device) -> None:
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
        table[BROKEN] = torch.nan
        self.table = table.to(device)
        self.num_rows: list[int] = []

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self.num_rows.append(len(inputs.ids))
        return self.table[inputs.ids[inputs.head_rows]]

    @property
    def largest(self) -> Largest:
        return largest


class LateCopies(CpuCopies):
    """Host and device apart, and each copy as late as it may be: one to the device may read its source until the
    step that it is for was waited for, and nothing else may be waited for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_waits = 0
        self._sent: list[LateSent] = []  # since the last fetch

    def stage(self, *shape: int, num_steps: int) -> Ring:
        buffers = [torch.zeros(shape, dtype=torch.int64) for _ in range(num_steps)]
        return Ring(torch.zeros(shape, dtype=torch.int64), buffers, self._send)

    def _send(self, target: torch.Tensor, source: torch.Tensor) -> LateSent:
        target.copy_(source)
        self._sent.append(LateSent(source))
        return self._sent[-1]

    def fetch(self, tensors: Sequence[torch.Tensor]) -> LateFetched:
        sent, self._sent = self._sent, []
        return LateFetched(self, tensors, sent)


class LateSent:
    def __init__(self, source: torch.Tensor) -> None:
        self.source, self.content = source, source.clone()
        self.is_done = False

    def synchronize(self) -> None:
        assert self.is_done, "the host waited for a step in flight"


class LateFetched:
    def __init__(self, copies: LateCopies, tensors: Sequence[torch.Tensor], sent: list[LateSent]) -> None:
        self._copies, self._sent = copies, sent
        self._tensors = [tensor.clone() for tensor in tensors]

    def wait(self) -> Sequence[torch.Tensor]:
        self._copies.num_waits += 1
        for sent in self._sent:
            assert torch.equal(sent.source, sent.content), "the host wrote to a buffer that a copy was reading"
            sent.is_done = True
        return self._tensors


class Rig:
    """Requests in, outputs out; `log` has the order of dispatches and collects."""

    def __init__(
        self, steps_in_flight: int = 2, *, copies: Copies | None = None, num_blocks: int = 200, device: str = "cpu"
    ) -> None:
        where = torch.device(device)
        self.limits = SchedulerLimits(
            max_num_seqs=6, max_step_tokens=24, max_adapters_per_step=1, max_model_len=64, eos_token_ids=(EOS,),
            steps_in_flight=steps_in_flight, max_wait_s=1e9,
        )  # fmt: skip
        self.slots = AdapterSlots(arena_bytes=PAGE, max_slots=2, device=ByteDevice(bytearray(PAGE)))
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE)
        self.forward = Matrix(where)
        self.runner = ModelRunner(
            self.forward, StepState(weights=None, ops=None), eos_token_ids=(EOS,), block_size=BLOCK_SIZE,
            max_rows=24, device=where, steps_in_flight=steps_in_flight, num_places=self.limits.num_places,
            copies=copies,
        )  # fmt: skip
        self.log: list[str] = []
        self.core = EngineCore(
            ready=None,
            scheduler=Scheduler(self.limits, self.blocks, self.slots),
            batches=BatchBuilder(24, 6, 16, BLOCK_SIZE),
            runner=self,
            slots=self.slots,
            phases_of=lambda key: {},
            steps_in_flight=steps_in_flight,
        )
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)

    def dispatch(self, batch):
        self.log.append("dispatch")
        return self.runner.dispatch(batch)

    def collect(self, handle):
        self.log.append("collect")
        return self.runner.collect(handle)

    def add(self, request_id: str, prompt: Sequence[int], **params) -> None:
        fields = {"max_tokens": 12, "temperature": 0.0, **params}
        self.core.add(AddRequest(request_id=request_id, prompt_ids=list(prompt), params=SamplingParams(**fields)))

    def step(self) -> None:
        for output in self.core.step().outputs:
            assert not self.is_over(output.request_id), "an output after the terminal one"
            self.outputs[output.request_id].append(output)

    def is_over(self, request_id: str) -> bool:
        return any(output.finish_reason for output in self.outputs[request_id])

    def run(self) -> dict[str, tuple[list[int], str, list]]:
        """To the end of everything: (tokens, finish reason, logprobs) of each request."""
        for _ in range(1000):
            if not self.core.has_work():
                break
            self.step()
        self.core.check_integrity()
        assert self.blocks.num_free == self.blocks.num_usable
        assert all(self.is_over(request_id) for request_id in self.outputs)
        return {
            request_id: (
                [token for output in outputs for token in output.token_ids],
                str(outputs[-1].finish_reason),
                [one for output in outputs for one in output.logprobs or []],
            )
            for request_id, outputs in self.outputs.items()
        }
