// ---- the whole step as one kernel ----
//
// One row's token through a decoder whose weights have 4 or 8 bits, in the files step_*.cu, which follow
// `decode_kernels.cu` in one program. A block a multiprocessor, all on the device at once: nothing is launched between two
// parts of a layer, and weights go on coming.
//
// Given as macros besides: LAYERS, GRID (blocks), PARTS (blocks that share the positions of a key/value head),
// STAGES and STAGE_BYTES (shared memory in which weights come), WHOLE_SHARED (all shared memory of a block).

typedef unsigned long long u64;

#define WIDTH (HEADS * HEAD_DIM)
#define STEP_WARPS 8
#define STEP_THREADS (32 * STEP_WARPS)
#define STEP_TEAMS (STEP_THREADS / LANES)
#define BLOCK_THREADS (STEP_THREADS + 32)  // the last warp copies

// All threads of a block but those that copy.
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" :: "n"(STEP_THREADS) : "memory"); }

// Which thread and which block this is. The compiler takes it for something new each time: in a kernel of many parts it
// would else keep what follows from it, for all of them, in registers that it has not.
__device__ __forceinline__ int own_thread() { int i; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i)); return i; }
__device__ __forceinline__ int own_block() { int i; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i)); return i; }

// ---- what blocks give each other ----
//
// Numbers of which the lowest bit says whether they are of an even layer or an odd one: whoever needs them looks until
// they are of the layer at hand. Nobody has to wait until everybody is done, nor for a store to be seen before the next.
// Each float has that bit, and the first of eight 16-bit numbers, which are written and read as one. A place is written
// again only in the next layer, by a block that has by then what came of everybody's having read it.

__device__ __forceinline__ u32 marked(u32 word, u32 tag) { return (word & ~1u) | (tag & 1); }
__device__ __forceinline__ bool is_of(u32 word, u32 tag) { return !((word ^ tag) & 1); }

struct OneFloat {
  float value;
  static __device__ __forceinline__ void give(u32* at, float value, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(marked(__float_as_uint(value), tag)) : "memory");
  }
  __device__ __forceinline__ void look(const u32* at) { asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(at) : "memory"); }
  __device__ __forceinline__ bool there(u32 tag) const { return is_of(__float_as_uint(value), tag); }
};
struct FourFloats {
  u32 words[4];
  __device__ __forceinline__ void look(const u32* at) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(at) : "memory");
  }
  __device__ __forceinline__ bool there(u32 tag) const {
    return is_of(words[0], tag) && is_of(words[1], tag) && is_of(words[2], tag) && is_of(words[3], tag);
  }
};
struct Eight {
  Word4 w;
  static __device__ __forceinline__ void give(u32* at, Word4 w, u32 tag) {
    asm volatile(
        "{\n.reg .b64 low, high;\n.reg .b128 all;\nmov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\nmov.b128 all, {low, high};\n"
        "st.relaxed.gpu.global.b128 [%0], all;\n}" :: "l"(at), "r"(marked(w.x, tag)), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  }
  __device__ __forceinline__ void look(const u32* at) {
    asm volatile(
        "{\n.reg .b64 low, high;\n.reg .b128 all;\nld.relaxed.gpu.global.b128 all, [%4];\nmov.b128 {low, high}, all;\n"
        "mov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(at) : "memory");
  }
  __device__ __forceinline__ bool there(u32 tag) const { return is_of(w.x, tag); }
};

// Looks until all items are of the layer; the j-th is at at(j).
template <class Item, int count, class At> __device__ __forceinline__ void take(const At& at, Item (&items)[count], u32 tag) {
#pragma unroll
  for (int j = 0; j < count; j++) items[j].look(at(j));
  bool all;
  do {
    all = true;
#pragma unroll
    for (int j = 0; j < count; j++)
      if (!items[j].there(tag)) { items[j].look(at(j)); all = false; }
  } while (!all);
}
// Where element i of the hidden states is: what neighbouring threads look at, four numbers each, lies side by side.
__device__ __forceinline__ int hidden_at(int i) { return (i / 256 * 2 + i / 4 % 2) * 128 + i / 8 % 32 * 4 + i % 4; }

// ---- the input of a product ----
//
// Levels are multiplied as they are and scaled afterwards: 1024 + q comes out of a level's bits (of the upper half of a
// byte 1024 + 16 q, so its x is a 16th), and what that adds for each 16 bytes of a row is known beforehand: `offsets`.

struct Input {
  u16* x;          // (k,), in the order of `place`
  float* offsets;  // (k / columns in 16 bytes,)
};

template <int bits> __device__ __forceinline__ float share_of(int e) { return bits == 4 && (e & 1) ? 0.0625f : 1.0f; }
template <int bits> __device__ __forceinline__ Word4 arranged(const float (&v)[8]) {
  float p[8];
#pragma unroll
  for (int e = 0; e < 8; e++) p[place<bits>(e)] = v[e] * share_of<bits>(e);
  return {narrow2(p[0], p[1]), narrow2(p[2], p[3]), narrow2(p[4], p[5]), narrow2(p[6], p[7])};
}
// Eight columns from i on, `arranged`, if there are so many. All threads of a warp come here, with neighbours.
template <int bits, int k> __device__ __forceinline__ void write_eight(Input in, int i, Word4 w) {
  constexpr int OWN = 128 / bits;
  constexpr float EVEN = bits == 4 ? 1032.0f : 1152.0f;
  float sum = EVEN * (low(w.x) + high(w.x) + low(w.z) + high(w.z)) + 1152.0f * (low(w.y) + high(w.y) + low(w.w) + high(w.w));
#pragma unroll
  for (int o = OWN / 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (i >= k) return;
  *(Word4*)(in.x + i) = w;
  if (i % OWN == 0) in.offsets[i / OWN] = sum;
}
// What `give_input` gave.
template <int bits, int k> __device__ __forceinline__ void take_input(const u32* given, Input in, u32 tag) {
  constexpr int OWN = (k / 8 + STEP_THREADS - 1) / STEP_THREADS;  // eights of a thread
  const int thread = own_thread();
  Eight eights[OWN];
  const auto column = [&](int i) { return (i * STEP_THREADS + thread) * 8; };
  take([&](int i) { return given + min(column(i), k - 8) / 2; }, eights, tag);
#pragma unroll
  for (int i = 0; i < OWN; i++) write_eight<bits, k>(in, column(i), eights[i].w);
  together();
}
// Column i, from each of eight neighbouring threads.
template <int bits> __device__ __forceinline__ void give_input(u32* given, int i, float value, u32 tag) {
  constexpr int OTHER = bits == 4 ? 4 : 1, NEXT = bits == 4 ? 1 : 2;  // the thread of the other half of a word, of the next
  const u32 eight = 0xffu << (own_thread() & 24);
  const float prepared = value * share_of<bits>(i), other = __shfl_xor_sync(eight, prepared, OTHER);
  const u32 word = narrow2(prepared, other);
  const u32 second = __shfl_down_sync(eight, word, NEXT), third = __shfl_down_sync(eight, word, 2 * NEXT), last = __shfl_down_sync(eight, word, 3 * NEXT);
  if (i % 8 == 0) Eight::give(given + i / 2, {word, second, third, last}, tag);
}

// Hidden states (D,), normalised and weighted, as the input of a product.
template <int bits> struct NormedInput {
  static constexpr int OWN = (DIM / 8 + STEP_THREADS - 1) / STEP_THREADS;  // eights of a thread
  Word4 weights[OWN];
  const int thread;

  __device__ __forceinline__ int column(int i) const { return (i * STEP_THREADS + thread) * 8; }
  __device__ __forceinline__ NormedInput(const u16* weight) : thread(own_thread()) {  // while the others are not done
#pragma unroll
    for (int i = 0; i < OWN; i++) weights[i] = load_weights(weight + min(column(i), DIM - 8));
  }
  __device__ __forceinline__ void take_hidden(const u32* hidden, u32 tag, float (&values)[OWN][8]) const {
    FourFloats fours[2 * OWN];
    take([&](int j) { return hidden + hidden_at(min(column(j / 2), DIM - 8) + j % 2 * 4); }, fours, tag);
#pragma unroll
    for (int j = 0; j < 2 * OWN; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) values[j / 2][j % 2 * 4 + e] = __uint_as_float(fours[j].words[e]);
  }
  // scratch: (STEP_WARPS,)
  __device__ __forceinline__ void write(const float (&values)[OWN][8], Input in, float* scratch) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) squares += column(i) < DIM ? values[i][e] * values[i][e] : 0.0f;
#pragma unroll
    for (int o = 16; o; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
    if ((thread & 31) == 0) scratch[thread / 32] = squares;
    together();
    squares = 0.0f;
#pragma unroll
    for (int w = 0; w < STEP_WARPS; w++) squares += scratch[w];
    const float factor = rsqrtf(squares / DIM + EPS);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const Word4 w = weights[i];
      const float weight[8] = {low(w.x), high(w.x), low(w.y), high(w.y), low(w.z), high(w.z), low(w.w), high(w.w)};
      float normed[8];
#pragma unroll
      for (int e = 0; e < 8; e++) normed[e] = values[i][e] * factor * weight[e];
      write_eight<bits, DIM>(in, column(i), arranged<bits>(normed));
    }
    together();
  }
};
