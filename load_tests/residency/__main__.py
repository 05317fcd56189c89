"""`python -m load_tests.residency traffic`, `… cpu` and `… gaps`."""

from load_tests.command import Kind, run_kind
from load_tests.residency import cpu, gaps, traffic

KINDS = {
    "traffic": Kind(traffic.run, traffic.Setting, "throughput of many adapters over few slots"),
    "cpu": Kind(cpu.run, cpu.Setting, "CPU time of the same, for machines that are shared with other work"),
    "gaps": Kind(gaps.run, gaps.Setting, "pauses of running streams while others are loaded"),
}

if __name__ == "__main__":
    run_kind("python -m load_tests.residency", KINDS)
