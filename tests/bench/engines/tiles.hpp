// Included before every file of llama.cpp: GCC 12 drops the stores that fill a tile configuration
// before the intrinsic that loads it, and the program faults where there are tiles.
#pragma once

#if defined(__AMX_TILE__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory")
#endif
