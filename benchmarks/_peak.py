"""The multiply-adds a second that one core of this machine can do: a loop of independent ones, in
its widest vectors.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = r"""
#include <immintrin.h>
#include <time.h>
static double now() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
#define LOOP(REAL, SET, FMA, WIDTH)                                                        \
  REAL x[12];                                                                             \
  for (int i = 0; i < 12; i++) x[i] = SET(1.0f + i);                                      \
  const REAL a = SET(0.999f), b = SET(0.001f);                                            \
  const double begun = now();                                                             \
  for (long n = 0; n < rounds; n++) {                                                     \
    _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) x[i] = FMA(x[i], a, b);         \
  }                                                                                       \
  const double spent = now() - begun;                                                     \
  REAL sum = x[0];                                                                        \
  for (int i = 1; i < 12; i++) sum = FMA(sum, a, x[i]);                                   \
  volatile float kept = ((float*)&sum)[0];                                                \
  (void)kept;                                                                             \
  return 2.0 * WIDTH * 12 * rounds / spent / 1e9;
__attribute__((target("avx512f"))) static double wide(long rounds) { LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, 16) }
__attribute__((target("avx2,fma"))) static double narrow(long rounds) { LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, 8) }
extern "C" double gigaflops(long rounds) { return __builtin_cpu_supports("avx512f") ? wide(rounds) : narrow(rounds); }
"""


def gigaflops() -> float:
    """float32 GFLOP/s of one thread, the best of several runs; NaN without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(SOURCE)
        subprocess.run(
            [compiler, "-O3", "-shared", "-fPIC", "-w", str(source), "-o", str(library)], check=True
        )
        run = ctypes.CDLL(str(library)).gigaflops
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_long]
    return max(run(2_000_000) for _ in range(9))


if __name__ == "__main__":
    print(f"{gigaflops():.0f} GFLOP/s")
