"""Bytes by collective, counted by hand for a model of 2752 numbers."""

import pytest

from irpe_ds.planner.communication import Collective, collective_seconds
from irpe_ds.planner.deepspeed import collectives, gathered_again
from tests.planner.conftest import cluster, tiny, zero

MATRICES, VECTOR = 64 * 32 + 10 * 64, 64
N = MATRICES + VECTOR


def payloads(
    stage: int, gpus: int = 4, precision: str = "bf16", accumulation: int = 1, **section: object
) -> dict[tuple[str, str, str], int]:
    """Bytes by collective, group and content."""
    found: dict[tuple[str, str, str], int] = {}
    sends = collectives(tiny(precision), zero(stage, **section), cluster(gpus), accumulation)
    for send in sends:
        key = (send.kind, send.group, send.content)
        found[key] = found.get(key, 0) + send.payload
    return found


REDUCED = ("all_reduce", "all", "gradients")
GATHERED = ("all_gather", "all", "parameters")
SCATTERED = ("reduce_scatter", "all", "gradients")


class TestPayloads:
    def test_one_gpu_sends_nothing(self) -> None:
        assert payloads(3, gpus=1) == {}

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_without_zero_gradients_once_an_update(self, accumulation: int) -> None:
        assert payloads(0, accumulation=accumulation) == {REDUCED: 4 * N}
        assert payloads(0, precision="fp32") == {REDUCED: 4 * N}

    def test_stage_1_once_and_stage_2_every_micro_step(self) -> None:
        # Groups of 64 and 2688 numbers fill 4 ranks x 2 evenly.
        assert payloads(1, accumulation=3) == {REDUCED: 4 * N, GATHERED: 2 * N}
        assert payloads(2, accumulation=3) == {REDUCED: 3 * 4 * N, GATHERED: 2 * N}

    def test_flat_groups_are_padded(self) -> None:
        # On 24 ranks of 2 numbers each: 64 -> 96, 2688 stays.
        assert payloads(1, gpus=24)[GATHERED] == 2 * (96 + 2688)

    def test_autocast_reduces_vectors_in_fp32(self) -> None:
        assert payloads(1, precision="autocast") == {
            REDUCED: 2 * MATRICES + 4 * VECTOR,
            GATHERED: 4 * N,
        }

    def test_communication_data_type(self) -> None:
        from irpe_ds.planner.zero import zero_of

        (send,) = collectives(tiny(), zero_of({"stage": 0}, "bf16"), cluster(4), 1)
        assert send.payload == 2 * N

    def test_stage_3_gathers_small_parameters_once_an_update(self) -> None:
        found = payloads(3, accumulation=3, stage3_param_persistence_threshold=100)
        assert found == {
            GATHERED: 3 * 2 * MATRICES + 2 * VECTOR,
            SCATTERED: 3 * 4 * N,
        }

    def test_stage_3_gathers_again_what_it_let_go(self) -> None:
        section = {
            "stage3_param_persistence_threshold": 100,
            "stage3_max_reuse_distance": 1000,
            "stage3_prefetch_bucket_size": 100,
        }
        assert [p.name for p in gathered_again(tiny(), zero(3, **section))] == ["0"]
        assert payloads(3, **section)[GATHERED] == 2 * (MATRICES + 64 * 32) + 2 * VECTOR

    def test_hpz_gathers_in_the_node_but_for_the_first_time(self) -> None:
        section = {"stage3_param_persistence_threshold": 100, "zero_hpz_partition_size": 8}
        found = payloads(3, gpus=16, accumulation=3, **section)
        assert found[GATHERED] == 2 * MATRICES + 2 * VECTOR
        assert found["all_gather", "node", "parameters"] == 2 * 2 * MATRICES

    def test_qwz_gathers_one_byte_a_number_and_a_scale(self) -> None:
        section = {"stage3_param_persistence_threshold": 100, "zero_quantized_weights": True}
        assert payloads(3, **section)[GATHERED] == MATRICES + 4 + 2 * VECTOR

    def test_qgz_sends_half_a_byte_in_the_node_and_an_eighth_of_it_between(self) -> None:
        found = payloads(3, gpus=16, zero_quantized_gradients=True)
        scales = 64 + 64  # the larger side of 64 x 32 and of 10 x 64
        assert found["all_to_all", "node", "gradients"] == MATRICES // 2 + 4 * scales
        assert found["all_to_all", "across", "gradients"] == MATRICES // 16 + 4 * scales // 8
        assert found[SCATTERED] == 2 * VECTOR

    def test_qgz_is_a_plain_reduce_scatter_in_one_node(self) -> None:
        assert payloads(3, gpus=8, zero_quantized_gradients=True)[SCATTERED] == 2 * N


class TestTime:
    def test_of_a_ring(self) -> None:
        # 4 GPUs at 100 GB/s, one call of 1 GB: Simple is fastest, 8.4 + 2 x 3 x 3.4 us late.
        send = Collective(kind="all_reduce", payload=10**9, calls=1, content="gradients")
        latency, transfer = collective_seconds(send, cluster(4), 1, link_share=1.0)
        assert transfer == pytest.approx(2 * 3 / 4 / 100)
        assert latency == pytest.approx(28.8e-6)

    def test_between_nodes_the_network_is_what_counts(self) -> None:
        # 16 GPUs, 8 cards of 10 GB/s a node: 80 GB/s of one ring through all.
        send = Collective(kind="all_gather", payload=10**9, calls=1, content="parameters")
        latency, transfer = collective_seconds(send, cluster(16), 1, link_share=0.5)
        assert transfer == pytest.approx(15 / 16 / 40)
        assert latency == pytest.approx(1e-6 * (8.4 + 13 * 3.4 + 2 * 14))

    def test_a_tree_is_faster_for_little_on_many_nodes(self) -> None:
        send = Collective(kind="all_reduce", payload=1000, calls=1, content="gradients")
        latency, _ = collective_seconds(send, cluster(4096), 1, link_share=1.0)
        assert latency == pytest.approx(1e-6 * (6.8 + 2 * (7 * 0.6 + 9 * 5.0)))

    def test_one_gpu_waits_for_nobody(self) -> None:
        send = Collective(kind="all_reduce", payload=1000, calls=1, content="gradients")
        assert collective_seconds(send, cluster(1), 1, link_share=1.0) == (0.0, 0.0)
