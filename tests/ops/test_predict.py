"""The prediction of kernel times: what is counted, what the model does, and what it says today."""

import ctypes
import functools
import sys
import tempfile
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from irpe_ds.errors import ConfigError
from irpe_ds.ops.bench.predict import __main__ as command
from irpe_ds.ops.bench.predict import calibration, flash, report
from irpe_ds.ops.bench.predict.cycles import simulate
from irpe_ds.ops.bench.predict.gpus import GPUS
from irpe_ds.ops.bench.predict.prediction import Counts, Prediction, Problem
from irpe_ds.ops.bench.predict.report import Case
from irpe_ds.ops.bench.predict.sass.cubin import Instruction, Program, program, tool
from irpe_ds.ops.bench.predict.sass.emulator import RECORD, Emulator, Launch, Traces
from irpe_ds.ops.bench.predict.sass.memory import wavefronts
from irpe_ds.ops.build import nvrtc
from irpe_ds.ops.build.toolchain import Unavailable

H100 = GPUS["H100"]


@pytest.fixture(scope="module")
def _tools() -> None:
    reason = nvrtc.unavailable_reason()
    try:
        tool("nvdisasm")
    except Unavailable as error:
        reason = str(error)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def _flash(_tools: None) -> None:
    try:
        tool("cuobjdump")
        flash.fat_binary("flash_fwd_hdim64_bf16_sm80")
    except Unavailable as error:
        pytest.skip(str(error))


class TestWavefronts:
    """A wavefront serves a word of each of 32 banks; wide accesses go by halves and quarters."""

    @pytest.mark.parametrize(
        ("width", "pitch", "expected"),
        [
            (4, 0, 1),  # one word for all lanes
            (4, 4, 1),
            (4, 8, 2),
            (4, 128, 32),
            (4, 132, 1),
            (2, 2, 1),
            (8, 8, 2),
            (16, 16, 4),
            (16, 128, 32),  # ldmatrix: eight rows in the same banks
            (16, 144, 4),  # rows with an odd number of 16 bytes
        ],
    )
    def test_by_distance_of_lanes(self, width: int, pitch: int, expected: int) -> None:
        lanes = np.arange(64, dtype=np.uint32).reshape(2, 32) * np.uint32(pitch)
        found = wavefronts(lanes + np.uint32(1024), np.ones((2, 32), bool), width)
        assert found.tolist() == [expected] * 2

    def test_lanes_that_take_no_part_cost_nothing(self) -> None:
        lanes = np.tile(np.arange(32, dtype=np.uint32) * np.uint32(128), (3, 1))
        mask = np.arange(32) < np.array([[0], [1], [5]])
        assert wavefronts(lanes, mask, 4).tolist() == [0, 1, 5]


KERNEL = r"""
extern "C" __global__ void kernel(int* out, int count, int stride, int divisor) {
  extern __shared__ int words[];
  const int thread = threadIdx.x;
  for (int n = 0; n < count; ++n) {
    if (thread % 3 != n % 3) words[thread * stride + n] = n;
    __syncwarp();
  }
  if (thread >= 32) return;
  const int hash = (thread * 7919 + count) / divisor % 97 ^ thread << 3;
  out[(hash - 1000) * 32] = hash;  // each in a line of its own
}
"""


class Params(ctypes.Structure):
    """Of the kernel."""

    _fields_ = (
        *(("out", ctypes.c_uint64), ("count", ctypes.c_int32)),
        *(("stride", ctypes.c_int32), ("divisor", ctypes.c_int32)),
    )


@functools.cache
def compiled(architecture: str) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(KERNEL)
        return program(nvrtc.compile_kernel(source, {}, architecture), "kernel")


def records(architecture: str, operation: str, params: Params) -> list[list[np.void]]:
    """What each of two warps has executed of an operation."""
    code = compiled(architecture)
    launch = Launch(bytes(params)[:20], 64, (1, 1, 1), ((0, 0, 0),), {})
    return [
        [x for x in trace if code.instructions[x["index"]].opcode[0] == operation]
        for trace in Emulator(code, launch).run().warps
    ]


@pytest.mark.usefixtures("_tools")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
class TestEmulator:
    OUT = 1 << 33

    @pytest.mark.parametrize(("stride", "conflicts"), [(1, 1), (2, 2), (32, 22)])
    def test_counts_the_stores(self, architecture: str, stride: int, conflicts: int) -> None:
        for stores in records(architecture, "STS", Params(self.OUT, 30, stride, 1)):
            assert len(stores) == 30
            assert all(conflicts - 1 <= x["x"] <= conflicts for x in stores)

    @pytest.mark.parametrize("divisor", [1, 7, -13, 1000])
    def test_integers_are_exact(self, architecture: str, divisor: int) -> None:
        stores, none = records(architecture, "STG", Params(self.OUT, 5, 1, divisor))
        assert not none
        places = set()
        for thread in range(32):
            quotient = int((thread * 7919 + 5) / divisor)  # towards zero, as in C
            remainder = abs(quotient) % 97 * (1 if quotient >= 0 else -1)
            places.add(self.OUT // 128 + (remainder ^ thread << 3) - 1000)
        (store,) = stores
        assert (store["x"], store["y"], store["z"]) == (min(places), len(places), 128)


def instruction(text: str, **scheduling: int) -> Instruction:
    opcode, _, operands = text.partition(" ")
    told = {"stall": 1, "write_barrier": 7, "read_barrier": 7, "wait_mask": 0} | scheduling
    return Instruction(text, "", tuple(opcode.split(".")), tuple(operands.split(", ")), **told)


def test_a_loop_over_the_values_that_lanes_have() -> None:
    """R2UR takes one lane's value, and its predicate tells which lanes have others."""
    lines = (
        ("", "S2R R4, SR_TID.X"),
        ("", "PLOP3.LUT P1, PT, PT, PT, PT, 0x80, 0x0"),
        ("P1", "R2UR P0, UR30, R4"),
        ("P1", "PLOP3.LUT P1, PT, P0, PT, PT, 0x80, 0x0"),
        ("P1", "BRA.U.ANY `(loop)"),
        ("", "STS [R4], R4"),
        ("", "EXIT"),
    )
    code = tuple(instruction(text)._replace(guard=guard) for guard, text in lines)
    kernel = Program("kernel", code, {"loop": 2}, {0: bytes(64)}, registers=32)
    launch = Launch(b"", 64, (1, 1, 1), ((0, 0, 0),), {})
    for trace in Emulator(kernel, launch).run().warps:
        assert (trace["index"] == 2).sum() == 32


def cycles(instructions: list[Instruction], warps: int = 1, **events: int) -> float:
    """That warps take which execute each of these once."""
    trace = np.zeros(len(instructions), RECORD)
    trace["index"], trace["state"] = np.arange(len(instructions)), 1
    for name, value in events.items():
        trace[name] = value
    code = Program("test", tuple(instructions), {}, {}, 32)
    traces = Traces([trace] * warps, {64: warps})
    return simulate(code, traces, H100.hardware(0), warps=warps, repeat=1, resident=1).cycles


class TestModel:
    START = 20
    """Cycles until a block's first instruction."""

    def test_stalls(self) -> None:
        assert cycles([instruction("NOP", stall=5)] * 10) == self.START + 9 * 5 + 1

    def test_matrix_instructions_wait_for_each_other(self) -> None:
        product = instruction("HMMA.16816.F32.BF16 R0, R4, R8, R0")
        assert cycles([product] * 101) == self.START + 100 * ceil(H100.hmma) + 1
        half = instruction("HMMA.1688.F32.BF16 R0, R4, R8, R0")
        assert cycles([half] * 101) == self.START + 100 * ceil(H100.hmma / 2) + 1

    def test_partitions_work_side_by_side(self) -> None:
        product = instruction("HMMA.16816.F32.BF16 R0, R4, R8, R0")
        assert cycles([product] * 100, warps=4) == cycles([product] * 100)
        assert cycles([product] * 100, warps=8) > 1.9 * cycles([product] * 100)

    def test_a_result_is_waited_for(self) -> None:
        load = instruction("LDS R0, [R1]", write_barrier=0)
        found = cycles([load, instruction("FADD R2, R0, R0", wait_mask=1)], x=8)
        assert found == self.START + H100.hardware(0).shared_latency + 8 + 1

    def test_shared_memory_is_one_for_all_partitions(self) -> None:
        loads = [instruction("LDS R0, [R1]")] * 100
        found = cycles(loads, warps=4, x=8) - self.START
        assert found == pytest.approx(4 * 100 * 8, rel=0.02)

    def test_an_mbarrier_waits_for_all_warps(self) -> None:
        arrive = instruction("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1], RZ", stall=9)
        wait = instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2")
        found = cycles([arrive, wait], warps=3, x=64, z=1)
        assert found == self.START + H100.hardware(0).barrier_latency + 1

    def test_warps_that_wait_for_ever_are_an_error(self) -> None:
        wait = instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2")
        with pytest.raises(RuntimeError, match="without end"):
            cycles([wait], x=64)


class TestFlash:
    def test_parameters_lie_where_the_kernels_read_them(self) -> None:
        assert ctypes.sizeof(flash.Forward) == 472
        assert ctypes.sizeof(flash.Backward) == 648

    @pytest.mark.parametrize(
        ("head_dim", "gpu", "tiles"),
        [
            (64, "H100", ("Li64ELi128ELi128ELi4E", "Li64ELi128ELi128ELi8E")),
            (64, "L40S", ("Li64ELi128ELi128ELi4E", "Li64ELi64ELi128ELi8E")),
            (80, "A100", ("Li96ELi128ELi64ELi4E", "Li96ELi64ELi128ELi8E")),
            (128, "L40S", ("Li128ELi128ELi32ELi4E", "Li128ELi64ELi64ELi8E")),
        ],
    )
    def test_tiles(self, head_dim: int, gpu: str, tiles: tuple[str, str]) -> None:
        of_gpu = head_dim, GPUS[gpu]
        found = flash.forward_tile(*of_gpu).mangled, flash.backward_tile(*of_gpu).mangled
        assert found == tiles


class TestReport:
    ROW = report.Row(
        Case(H100, Problem("k")),
        {
            name: Prediction(us, Counts(100, 20, 30), 1000, {"stall": 0.6, "hmma": 0.4}, {})
            for name, us in (
                *(("forward", 80.0), ("backward_queries", 160.0), ("backward_keys", 160.0)),
                *(("flash forward", 100.0), ("flash backward", 400.0)),
            )
        },
    )

    def test_ratios(self) -> None:
        assert self.ROW.ratio("forward") == 0.8
        assert self.ROW.ratio("backward") == 0.8
        assert self.ROW.ratio("forward", "backward") == 0.8
        part = self.ROW._replace(predictions={"forward": self.ROW.predictions["forward"]})
        assert part.ratio("forward") is None

    def test_says_predicted_in_every_line(self) -> None:
        lines = list(report.lines(self.ROW))
        measured = calibration.Comparison(calibration.MEASURED[0], 300.0, 200.0)
        lines.append(report.calibration_line(measured))
        assert len(lines) == 5 + 1 + 1
        assert all(line.startswith("predicted ") for line in lines)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--grid", "14"], r"^--grid: expected such as 14x14, got 14$"),
            (["--on", "x"], r"^--on: expected a non-empty subset of qkv, got x$"),
            (["--head-dim", "60"], r"^--head-dim: expected multiples of 8 up to 128, got 60$"),
            (["--grid", "99x99"], r"^forward cannot run on H100: a grid of 99 x 99 patches has"),
            (["--out", "/no/such/x.json"], r"^--out: expected a file in a folder that exists"),
        ],
    )
    def test_mistakes(
        self, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["predict", *options])
        with pytest.raises(ConfigError, match=message):
            command.main()


@pytest.mark.slow
@pytest.mark.usefixtures("_flash")
class TestToday:
    """What is predicted for this tree, and 3 % more: what costs more has to say so here."""

    @pytest.mark.parametrize(
        ("gpu", "problem", "most"),
        [
            ("H100", Problem("k"), 0.70),
            ("H100", Problem("qkv"), 1.15),
            ("H100", Problem("k", (16, 16), 128), 0.84),
            ("A100", Problem("k"), 0.85),
        ],
    )
    def test_ratio_to_flash(self, gpu: str, problem: Problem, most: float) -> None:
        ratio = report.predict(Case(GPUS[gpu], problem)).ratio("forward", "backward")
        assert ratio is not None
        assert 0.9 * most < ratio <= most, "now faster, or slower: change the number"

    @pytest.mark.parametrize("row", [calibration.MEASURED[n] for n in (1, 7)], ids=str)
    def test_agrees_with_measurements_of_flash(self, row: calibration.Measured) -> None:
        (found,) = calibration.compare([row])
        assert found.forward == pytest.approx(row.forward, rel=0.10)
        assert found.backward == pytest.approx(row.backward, rel=0.10)
