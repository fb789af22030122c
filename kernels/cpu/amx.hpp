// The tile instructions behind one set of names: the machine's own, or the same in plain C++.
//
// The emulation exists so that the logic of the AMX kernels is tested on machines without tiles; it
// traps where the hardware would. The real ones are assembly with memory clobbers because GCC 12
// may drop the stores that fill a configuration before the intrinsic that loads it.
#pragma once

#include "kernel.hpp"

namespace qpass {

// palette 1: eight tiles of at most 16 rows of 64 bytes
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int64_t tile_rows, int64_t row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    bytes_per_row[tile] = static_cast<uint16_t>(row_bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

#if defined(__AMX_TILE__)

static inline void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

static inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int T>
static inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"n"(T));
}

template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(T), "r"(from), "r"(stride) : "memory");
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(T), "r"(to), "r"(stride) : "memory");
}

// C += A @ B with signed A and unsigned B, four products to a lane
template <int C, int A, int B>
static inline void tile_dot_su8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B));
}

// C += A @ B in bfloat16, two products to a float32 lane
template <int C, int A, int B>
static inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B));
}

#else

struct EmulatedTiles {
  TileConfig config;
  bool configured = false;
  uint8_t data[8][16][64];
};

static thread_local EmulatedTiles tiles;

static inline void tile_expect(bool holds) {
  if (!holds) __builtin_trap();
}

static inline void tile_configure(const TileConfig& config) {
  tile_expect(config.palette == 1);
  for (int t = 0; t < 8; ++t) {
    tile_expect(config.rows[t] <= 16 && config.bytes_per_row[t] <= 64);
  }
  tiles.config = config;
  tiles.configured = true;
  __builtin_memset(tiles.data, 0, sizeof(tiles.data));
}

static inline void tile_release() { tiles.configured = false; }

template <int T>
static inline void tile_zero() {
  tile_expect(tiles.configured && tiles.config.rows[T]);
  __builtin_memset(tiles.data[T], 0, sizeof(tiles.data[T]));
}

template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    __builtin_memcpy(tiles.data[T][r], static_cast<const char*>(from) + r * stride,
                     tiles.config.bytes_per_row[T]);
  }
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
  tile_expect(tiles.configured);
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles.data[T][r],
                     tiles.config.bytes_per_row[T]);
  }
}

template <int C, int A, int B>
static inline void tile_expect_shapes() {
  const TileConfig& c = tiles.config;
  tile_expect(tiles.configured && C != A && C != B && A != B);
  tile_expect(c.rows[C] == c.rows[A] && c.bytes_per_row[C] == c.bytes_per_row[B]);
  tile_expect(c.bytes_per_row[A] == 4 * c.rows[B]);
}

template <int C, int A, int B>
static inline void tile_dot_su8() {
  tile_expect_shapes<C, A, B>();
  for (int m = 0; m < tiles.config.rows[C]; ++m) {
    for (int n = 0; n < tiles.config.bytes_per_row[C] / 4; ++n) {
      uint32_t sum;
      __builtin_memcpy(&sum, tiles.data[C][m] + 4 * n, 4);
      for (int k = 0; k < tiles.config.bytes_per_row[A]; ++k) {
        const int a = static_cast<int8_t>(tiles.data[A][m][k]);
        const int b = tiles.data[B][k / 4][4 * n + k % 4];
        sum += static_cast<uint32_t>(a * b);
      }
      __builtin_memcpy(tiles.data[C][m] + 4 * n, &sum, 4);
    }
  }
}

static inline float tile_bfloat(const uint8_t* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

template <int C, int A, int B>
static inline void tile_dot_bf16() {
  tile_expect_shapes<C, A, B>();
  for (int m = 0; m < tiles.config.rows[C]; ++m) {
    for (int n = 0; n < tiles.config.bytes_per_row[C] / 4; ++n) {
      float sum;
      __builtin_memcpy(&sum, tiles.data[C][m] + 4 * n, 4);
      for (int k = 0; k < tiles.config.bytes_per_row[A] / 2; ++k) {
        sum += tile_bfloat(tiles.data[A][m] + 2 * k) *
               tile_bfloat(tiles.data[B][k / 2] + 4 * n + 2 * (k % 2));
      }
      __builtin_memcpy(tiles.data[C][m] + 4 * n, &sum, 4);
    }
  }
}

#endif

// 2 x 2 tiles of sums: C0 C1 / C2 C3 += (A0 / A1) @ (B0 B1)
enum Tiles { kC0, kC1, kC2, kC3, kA0, kA1, kB0, kB1 };
constexpr int64_t kTileRows = 16;

// both tiles of A hold 16 rows, both of B `lines` lines
static inline void configure_2x2(int64_t lines) {
  TileConfig config;
  for (int t = kC0; t <= kC3; ++t) config.shape(t, kTileRows, kLine);
  for (int t = kA0; t <= kA1; ++t) config.shape(t, kTileRows, 4 * lines);
  for (int t = kB0; t <= kB1; ++t) config.shape(t, lines, kLine);
  tile_configure(config);
}

static inline void zero_2x2() {
  tile_zero<kC0>();
  tile_zero<kC1>();
  tile_zero<kC2>();
  tile_zero<kC3>();
}

// sums [4][16][16], 32-bit: rows 0-15 and 16-31 of blocks 0 and 1
static inline void store_2x2(void* to) {
  char* p = static_cast<char*>(to);
  tile_store<kC0>(p, kLine);
  tile_store<kC1>(p + 1024, kLine);
  tile_store<kC2>(p + 2048, kLine);
  tile_store<kC3>(p + 3072, kLine);
}

}  // namespace qpass
