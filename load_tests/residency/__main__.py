"""`python -m load_tests.residency traffic` and `… gaps`."""

from load_tests.command import Kind, run_kind
from load_tests.residency import gaps, traffic

KINDS = {
    "traffic": Kind(traffic.run, traffic.Setting, "throughput of many adapters over few slots"),
    "gaps": Kind(gaps.run, gaps.Setting, "pauses of running streams while others are loaded"),
}

if __name__ == "__main__":
    run_kind("python -m load_tests.residency", KINDS)
