#!/usr/bin/env bash
# Cross-compiles the native code for 64-bit Arm and runs its checks under an emulator.
# Debian's packages: g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
aarch64-linux-gnu-g++ -std=c++17 -O3 -ffp-contract=off -fopenmp -static -Iadapters/device \
    tests/native/checks.cpp adapters/kernels/lora_cpu.cpp server/model/cpu/ops.cpp -o "$work/checks" 2> "$work/log" \
    || { cat "$work/log"; exit 1; }
qemu-aarch64 "$work/checks"
