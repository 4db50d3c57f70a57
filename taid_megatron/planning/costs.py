"""Seconds and bytes of one optimizer step, before it has ever run.

A roofline: operations over the rate that matrix products reach, bytes over the bandwidth that they
reach. The shares of the makers' peaks below are assumptions (what large Megatron runs report), not
measurements of this project; they scale times, and hardly the order of layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from taid_megatron.config.batches import data_parallel_size, num_microbatches, train_samples
from taid_megatron.config.schema import Architecture
from taid_megatron.planning import timeline
from taid_megatron.planning.gpus import GPU
from taid_megatron.planning.memory import Sizes
from taid_megatron.planning.shape import head_operations, layer_operations

LINK_SHARE = 0.7
"""Share of a link's peak that collectives and messages reach."""
MEMORY_SHARE = 0.8
"""Share of the memory's peak bandwidth that elementwise work reaches."""
_LOSS_BYTES = 10
"""Memory traffic of the loss per token and vocabulary column, bf16: 2 + 2 read, 2 + 2 + 2."""
_STATISTICS = 20
"""Bytes per token and rank in the loss's all-gather: five floats."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of the fullest kind sends per optimizer step."""

    tensor: float
    pipeline_forward: float
    """Student's and teacher's activations."""
    pipeline_backward: float
    """The student's gradient alone."""
    data: float
    loss: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and where they go on the average rank."""

    seconds: float
    compute: float
    tensor: float
    """Collectives of tensor parallelism: they wait for nothing and hide nothing."""
    waiting: float
    """The pipeline's bubble and messages."""
    data: float
    """Gradient reduction and weight gathering that no compute hides."""
    optimizer: float
    bubble: float
    """Share of the pipeline's time in which ranks wait."""
    tokens_per_second: float
    days: float
    """Of the whole run at the full batch size."""


@dataclass(frozen=True)
class Costs:
    """A layout on a kind of GPU."""

    sizes: Sizes
    gpu: GPU
    efficiency: float
    """Share of the peak rate that matrix products reach, 0 to 1."""

    @property
    def micro_batches(self) -> int:
        """Per step and replica, at the full batch size."""
        training = self.sizes.config.training.model_copy(update={"rampup": None})
        config = self.sizes.config.model_copy(update={"training": training})
        return num_microbatches(config, self.sizes.world_size)

    def forward(self) -> list[float]:
        """Seconds of both models' forward, per stage."""
        return [
            self.compute_forward(k) + self._collectives(k, 2.0, with_teacher=True)
            for k in range(self._count)
        ]

    def backward(self) -> list[float]:
        """Seconds of the student's backward, what is recomputed included, per stage."""
        repeats = self._recomputed_share()
        return [
            self.compute_backward(k) + self._collectives(k, 2.0 + 2.0 * repeats)
            for k in range(self._count)
        ]

    def student_layer(self) -> float:
        """Seconds of one student layer, forward and backward."""
        shape = self.sizes.config.student.architecture
        one = self._layer_seconds(shape)
        return one * (3 + self._recomputed_share()) + self._collective(
            shape, self.sizes.element, 4.0 + 2.0 * self._recomputed_share()
        )

    def teacher_layer(self) -> float:
        """Seconds of one teacher layer, forward."""
        shape = self.sizes.teacher
        if shape is None:
            return 0.0
        return self._layer_seconds(shape) + self._collective(shape, self.sizes.teacher_element, 2.0)

    def beside_layers(self) -> list[float]:
        """Seconds of heads and loss, per stage, forward and backward."""
        return [
            self._head_seconds() * self._heads(k) + 2 * self._loss_seconds(k)
            for k in range(self._count)
        ]

    def compute_forward(self, k: int) -> float:
        """Seconds of a stage's products and loss."""
        sizes = self.sizes
        total = sizes.student_stages()[k].layers * self._layer_seconds(
            sizes.config.student.architecture
        )
        total += self._loss_seconds(k)
        if sizes.student_stages()[k].last:
            total += self._head(sizes.config.student.architecture)
        if sizes.teacher is not None:
            stage = sizes.teacher_stages()[k]
            total += stage.layers * self._layer_seconds(sizes.teacher)
            total += self._head(sizes.teacher) if stage.last else 0.0
        return total

    def compute_backward(self, k: int) -> float:
        """Seconds of a stage's gradients: twice the forward, and what is recomputed."""
        shape, stage = self.sizes.config.student.architecture, self.sizes.student_stages()[k]
        total = (2 + self._recomputed_share()) * stage.layers * self._layer_seconds(shape)
        total += 2 * self._head(shape) if stage.last else 0.0
        return total + self._loss_seconds(k)

    def traffic(self) -> Traffic:
        """Bytes per optimizer step that the rank with most of each kind sends."""
        sizes, parallel = self.sizes, self.sizes.config.parallel
        micro_batches, pipeline = self.micro_batches, parallel.pipeline
        per_rank = [0.0] * pipeline
        for k in range(self._count):
            volume = self._volume(k, 4.0 + 2.0 * self._recomputed_share(), 2.0)
            per_rank[k % pipeline] += volume
        student, teacher = self._message_bytes()
        # the last stage sends none forward and the first none backward; with chunks nearly all do
        sends = micro_batches * (sizes.chunks if pipeline > 1 else 0)
        tensor = parallel.tensor
        loss = sizes.tokens * _STATISTICS * (tensor - 1) * micro_batches
        return Traffic(
            tensor=max(per_rank) * micro_batches,
            pipeline_forward=sends * (student + teacher),
            pipeline_backward=sends * student,
            data=self._data_bytes(),
            loss=loss,
        )

    def durations(self) -> timeline.Durations:
        """What the simulation needs."""
        student, teacher = self._message_bytes()
        rate = self._pipeline_rate() * LINK_SHARE * 1e9
        return timeline.Durations(
            forward=self.forward(),
            backward=self.backward(),
            send_forward=(student + teacher) / rate,
            send_backward=student / rate,
            overlapped=self.sizes.config.parallel.p2p_overlapped,
        )

    def timeline(self, micro_batches: int | None = None) -> timeline.Timeline:
        """One step, or its first micro_batches."""
        pipeline = self.sizes.config.parallel.pipeline
        count = micro_batches or self.micro_batches
        return timeline.simulate(self.durations(), pipeline, self.sizes.chunks, count)

    def step(self) -> StepTime:
        """Time of one optimizer step. Of many micro-batches the steady middle is extrapolated."""
        config, pipeline = self.sizes.config, self.sizes.config.parallel.pipeline
        count = self.micro_batches
        few = min(count, 4 * pipeline)
        seconds = self.timeline(few).seconds
        if count > few:
            seconds += (count - few) * (self.timeline(few + pipeline).seconds - seconds) / pipeline
        stages = range(self._count)
        compute = count * sum(self.compute_forward(k) + self.compute_backward(k) for k in stages)
        busy = count * (sum(self.forward()) + sum(self.backward()))
        data, optimizer = self._data_seconds(), self._optimizer_seconds()
        total = seconds + data + optimizer
        tokens = config.training.global_batch_size * config.training.seq_length
        rate = tokens / total
        return StepTime(
            seconds=total,
            compute=compute / pipeline,
            tensor=(busy - compute) / pipeline,
            waiting=seconds - busy / pipeline,
            data=data,
            optimizer=optimizer,
            bubble=1 - busy / pipeline / seconds,
            tokens_per_second=rate,
            days=train_samples(config) * config.training.seq_length / rate / 86400,
        )

    @property
    def _count(self) -> int:
        return self.sizes.config.parallel.pipeline * self.sizes.chunks

    def _flops(self) -> float:
        # fp32 products take the tensor cores' TF32 path at best: half of bf16
        half = 0.5 if self.sizes.config.training.precision == "fp32" else 1.0
        return self.gpu.bf16_tflops * 1e12 * self.efficiency * half

    def _layer_seconds(self, shape: Architecture) -> float:
        length, tensor = self.sizes.config.training.seq_length, self.sizes.config.parallel.tensor
        return layer_operations(shape, length) * self.sizes.tokens / tensor / self._flops()

    def _head(self, shape: Architecture) -> float:
        padded, tensor = self.sizes.vocabulary.padded, self.sizes.config.parallel.tensor
        return head_operations(shape, padded) * self.sizes.tokens / tensor / self._flops()

    def _head_seconds(self) -> float:
        student = 3 * self._head(self.sizes.config.student.architecture)
        return student + (self._head(self.sizes.teacher) if self.sizes.teacher else 0.0)

    def _heads(self, k: int) -> int:
        return int(k == self._count - 1)

    def _loss_seconds(self, k: int) -> float:
        """Half of the loss's passes: forward and backward alike."""
        elements = self.sizes.tokens * self.sizes.vocabulary.shard_size * self._heads(k)
        return elements * _LOSS_BYTES / 2 / (self.gpu.memory_gb_s * 1e9 * MEMORY_SHARE)

    def _recomputed_share(self) -> float:
        """Of a layer's forward that its backward repeats (attention alone: a tenth, roughly)."""
        recompute = self.sizes.config.training.recompute
        if recompute.granularity == "full":
            return 1.0
        if recompute.granularity == "none":
            return 0.0
        return min(sum({"core_attn": 0.1, "mlp": 0.6}.get(m, 0.0) for m in recompute.modules), 1.0)

    def _collective(self, shape: Architecture, element: int, count: float) -> float:
        """Seconds of so many all-reduces of a layer's activation."""
        return self._collective_bytes(shape, element, count) / (
            self.gpu.link_gb_s * 1e9 * LINK_SHARE
        )

    def _collective_bytes(self, shape: Architecture, element: int, count: float) -> float:
        tensor = self.sizes.config.parallel.tensor
        whole = self.sizes.tokens * shape.hidden_size * element
        return count * whole * 2 * (tensor - 1) / tensor

    def _volume(self, k: int, student: float, teacher: float) -> float:
        sizes = self.sizes
        volume = sizes.student_stages()[k].layers * self._collective_bytes(
            sizes.config.student.architecture, sizes.element, student
        )
        if sizes.teacher is not None and teacher:
            volume += sizes.teacher_stages()[k].layers * self._collective_bytes(
                sizes.teacher, sizes.teacher_element, teacher
            )
        return volume

    def _collectives(self, k: int, count: float, *, with_teacher: bool = False) -> float:
        volume = self._volume(k, count, 2.0 if with_teacher else 0.0)
        return volume / (self.gpu.link_gb_s * 1e9 * LINK_SHARE)

    def _message_bytes(self) -> tuple[float, float]:
        sizes = self.sizes
        if sizes.config.parallel.pipeline == 1:
            return 0.0, 0.0
        student = sizes.config.student.architecture.hidden_size * sizes.element
        teacher = sizes.teacher.hidden_size * sizes.teacher_element if sizes.teacher else 0
        return float(sizes.sharded_tokens * student), float(sizes.sharded_tokens * teacher)

    def _pipeline_rate(self) -> float:
        """Megatron numbers ranks tensor first, data second, pipeline last."""
        parallel = self.sizes.config.parallel
        stride = parallel.tensor * data_parallel_size(self.sizes.config, self.sizes.world_size)
        inside = stride * parallel.pipeline <= self.gpu.gpus_per_node
        return self.gpu.link_gb_s if inside else self.gpu.network_gb_s

    def _largest_stage(self) -> float:
        sizes, per_rank = self.sizes, [0.0] * self.sizes.config.parallel.pipeline
        for k, stage in enumerate(sizes.student_stages()):
            per_rank[k % len(per_rank)] += sizes.student_parameters(stage)
        return max(per_rank)

    def _data_bytes(self) -> float:
        """A reduction of fp32 gradients; sharded, a scatter of them and a gather of weights."""
        shards = data_parallel_size(self.sizes.config, self.sizes.world_size)
        element = 4 + (
            self.sizes.element if self.sizes.config.parallel.distributed_optimizer else 4
        )
        return element * self._largest_stage() * (shards - 1) / shards

    def _data_seconds(self) -> float:
        parallel = self.sizes.config.parallel
        shards = data_parallel_size(self.sizes.config, self.sizes.world_size)
        inside = parallel.tensor * shards <= self.gpu.gpus_per_node
        rate = self.gpu.link_gb_s if inside else self.gpu.network_gb_s
        seconds = self._data_bytes() / (rate * 1e9 * LINK_SHARE)
        if not parallel.overlap_grad_reduce:
            return seconds
        # hidden behind the last micro-batch's backward
        return max(seconds - max(self.backward()) * self.sizes.chunks, 0.0)

    def _optimizer_seconds(self) -> float:
        """Gradient, master weight and moments read, the last three and the weight written."""
        shards = data_parallel_size(self.sizes.config, self.sizes.world_size)
        share = shards if self.sizes.config.parallel.distributed_optimizer else 1
        traffic = (16 + 12 + self.sizes.element) * self._largest_stage() / share
        return traffic / (self.gpu.memory_gb_s * 1e9 * MEMORY_SHARE)


def with_splits(
    costs: Costs, student: tuple[int, ...] | None, teacher: tuple[int, ...] | None
) -> Costs:
    """The same layout with other layers per stage."""
    config = costs.sizes.config
    update = {"student": config.student.model_copy(update={"layers_per_stage": student})}
    if config.teacher is not None:
        update["teacher"] = config.teacher.model_copy(update={"layers_per_stage": teacher})  # type: ignore[assignment]
    return replace(costs, sizes=replace(costs.sizes, config=config.model_copy(update=update)))
