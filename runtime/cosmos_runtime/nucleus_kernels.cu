// Chooses one of the tokens that a top-k of any size, and then a nucleus (arXiv:1904.09751), leave of a whole vocabulary:
// three kernels, each with PARTS blocks a row. Follows sampling_kernels.cu.
//
// A token's weight is a whole number, the likeliest one's WHOLE. So sums of weights are exact in any order, and blocks
// may add up as they come. Who would have less than half of one is never drawn: of all that is likely, 1e-9 at most.

#define WHOLE ((double)((1ull << 62) / VOCAB))
// In a row's scratch, behind what each block gives: keys of the row, and weights and tokens in each of SIZE bins.
#define LARGEST (2 * PARTS)
#define LEAST (LARGEST + 1)
#define BORDER (LARGEST + 2)  // the lowest key that is kept
#define WEIGHTS GROUPS
#define COUNTS (GROUPS + SIZE)
#define AHEAD 8  // logits of a row that a thread reads before it looks at any

// Of a row: how logits become weights, and bins of which the first has the likeliest tokens.
struct Scale {
  double largest, sharpness, bins;  // the last one: bins to a logit

  __device__ __forceinline__ u64 weight(float x) const {
    const double own = exp(((double)x - largest) * sharpness) * WHOLE;
    return own >= 0.5 ? (u64)(own + 0.5) : 0;
  }
  __device__ __forceinline__ int bin(float x) const {
    const double place = (largest - (double)x) * bins;
    return place < SIZE - 1 ? (int)place : SIZE - 1;
  }
};

__device__ __forceinline__ Scale scale_of(const Buffers& at, int row) {
  const u64* known = at.between + (i64)row * SCRATCH;
  const double largest = logit_of(__ldcg(known + LARGEST)), least = logit_of(__ldcg(known + LEAST));
  const double sharpness = __ldcg(at.sharpness + row);
  // What has no weight is in the last bin.
  const double weighty = log(4.0 * WHOLE) / sharpness * SIZE / (SIZE - 1.0);
  return {largest, sharpness, SIZE / (largest - least < weighty ? largest - least : weighty)};
}

// ---- the largest and the least ----

extern "C" __global__ void __launch_bounds__(SIZE, 1) nucleus_extent(const Buffers at) {
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  let_next_start();
  wait_for_last();
  const bool held = is_held(at, row);
  u64 largest = 0, least = 0;  // of those that are there; the least as its complement
  for (int token = part * SIZE + threadIdx.x; token < VOCAB; token += PARTS * SIZE) {
    const u64 key = key_of(score(at, row, held, token), token);
    largest = key > largest ? key : largest;
    least = ~key > least ? ~key : least;
  }
  largest = largest_of_block(largest);
  least = largest_of_block(least);
  u64* between = at.between + (i64)row * SCRATCH;
  if (threadIdx.x == 0) { between[part] = largest; between[PARTS + part] = least; }
  if (!is_last(at, row) || threadIdx.x >= 32) return;
  largest = largest_of_warp(__ldcg(between + threadIdx.x));
  least = largest_of_warp(__ldcg(between + PARTS + threadIdx.x));
  if (threadIdx.x == 0) { between[LARGEST] = largest; between[LEAST] = ~least; }
}

// ---- the border ----
//
// Tokens in falling order, each with what it is worth: its weight, or 1 where ranks count. Those are kept before which
// less than `wanted` is summed up. One block finds the lowest of them: first its bin, then among the bin's tokens.

// The thread whose value takes a sum that begins with `before` to `wanted`, -1 where none does; `before` gets the sum
// up to it.
__device__ __forceinline__ int crossing(u64 value, double wanted, u64& before) {
  __shared__ int thread;
  __shared__ u64 lower;
  u64 all;
  const u64 reached = before + sum_in_block(value, all);
  if (threadIdx.x == 0) { thread = -1; lower = 0; }
  __syncthreads();
  if ((double)(reached - value) < wanted && (double)reached >= wanted) { thread = threadIdx.x; lower = reached - value; }
  __syncthreads();
  before = lower;
  return thread;
}

// Tokens of a row whose keys lie in a range, and whose logits in a bin.
struct Members {
  int row, bin;
  bool held;
  Scale scale;
  u64 low, high;

  template <class Use> __device__ __forceinline__ void each(const Buffers& at, const Use& use) const {
    const i64 begin = (i64)row * VOCAB;
    for (int first = threadIdx.x; first < VOCAB; first += AHEAD * SIZE) {
      float logits[AHEAD], penalties[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const i64 place = begin + min(first + i * SIZE, VOCAB - 1);
        logits[i] = __ldcg(at.logits + place);
        penalties[i] = at.seen ? __ldcg(at.seen + place) : 1.0f;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int token = first + i * SIZE;
        if (token >= VOCAB) break;
        const float x = held && !__ldcg(at.goes_on + token) ? NOTHING : penalised(logits[i], penalties[i]);
        const u64 key = key_of(x, token);
        if (key >= low && key <= high && scale.bin(x) == bin) use(key, x);
      }
    }
  }
};

// Puts the members into `found`, as far as there is room, and narrows their range to them; how many there are.
__device__ __forceinline__ int gather(const Buffers& at, Members& members, u64* found) {
  __shared__ int reached;
  __syncthreads();
  if (threadIdx.x == 0) reached = 0;
  __syncthreads();
  u64 largest = 0, least = 0;
  members.each(at, [&](u64 key, float) {
    const int place = atomicAdd(&reached, 1);
    if (place < ROOM) found[place] = key;
    largest = key > largest ? key : largest;
    least = ~key > least ? ~key : least;
  });
  members.high = largest_of_block(largest);
  members.low = ~largest_of_block(least);
  return reached;
}

// Narrows members that do not fit to those about the border; `before` is what is summed up before them.
__device__ __forceinline__ void narrow(const Buffers& at, Members& members, bool ranks, double wanted, u64& before) {
  __shared__ u64 sums[SIZE];
  const int bits = 64 - __clzll((i64)(members.high - members.low)), shift = bits > 10 ? bits - 10 : 0;
  sums[threadIdx.x] = 0;
  __syncthreads();
  members.each(at, [&](u64 key, float x) {
    atomicAdd(&sums[(members.high - key) >> shift], ranks ? 1 : members.scale.weight(x));
  });
  __syncthreads();
  const u64 part = crossing(sums[threadIdx.x], wanted, before), width = (1ull << shift) - 1;
  members.high -= part << shift;
  members.low = members.high - members.low > width ? members.high - width : members.low;
}

// The lowest key that is kept of the members, which may be all of a bin.
__device__ __noinline__ u64 border_in(const Buffers& at, Members members, bool ranks, double wanted, u64 before) {
  __shared__ u64 found[ROOM], worth[ROOM], border;
  int count = gather(at, members, found);
  while (count > ROOM) {  // seldom: as many are equal, or nearly so
    narrow(at, members, ranks, wanted, before);
    count = gather(at, members, found);
  }
  if (threadIdx.x == 0) border = ~0ull;
  if (threadIdx.x < count) worth[threadIdx.x] = ranks ? 1 : members.scale.weight(logit_of(found[threadIdx.x]));
  __syncthreads();
  for (int first = 0; first < count; first += SIZE / 8) {
    const int own = first + threadIdx.x / 8;
    u64 larger = 0;
    if (own < count)
      for (int i = threadIdx.x % 8; i < count; i += 8) larger += found[i] > found[own] ? worth[i] : 0;
#pragma unroll
    for (int o = 4; o; o >>= 1) larger += __shfl_xor_sync(~0u, larger, o);
    if (own < count && threadIdx.x % 8 == 0 && (double)(before + larger) < wanted) atomicMin(&border, found[own]);
  }
  __syncthreads();
  return border;
}

extern "C" __global__ void __launch_bounds__(SIZE, 1) nucleus_border(const Buffers at) {
  __shared__ u64 weights[SIZE];
  __shared__ u32 counts[SIZE];
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  weights[threadIdx.x] = 0;
  counts[threadIdx.x] = 0;
  let_next_start();
  wait_for_last();
  __syncthreads();
  const bool held = is_held(at, row);
  const Scale scale = scale_of(at, row);
  for (int token = part * SIZE + threadIdx.x; token < VOCAB; token += PARTS * SIZE) {
    const float x = score(at, row, held, token);
    const int bin = scale.bin(x);
    atomicAdd(&weights[bin], scale.weight(x));
    atomicAdd(&counts[bin], 1u);
  }
  __syncthreads();
  u64* between = at.between + (i64)row * SCRATCH;
  if (counts[threadIdx.x]) {
    atomicAdd(between + WEIGHTS + threadIdx.x, weights[threadIdx.x]);
    atomicAdd(between + COUNTS + threadIdx.x, (u64)counts[threadIdx.x]);
  }
  if (!is_last(at, row)) return;
  u64 weight = __ldcg(between + WEIGHTS + threadIdx.x), count = __ldcg(between + COUNTS + threadIdx.x), before = 0, all;
  between[WEIGHTS + threadIdx.x] = between[COUNTS + threadIdx.x] = 0;  // for the next token
  Members members = {row, 0, held, scale, 0, ~0ull};
  weights[threadIdx.x] = weight;
  const double ranks = (double)__ldcg(at.top_k + row);
  members.bin = crossing(count, ranks, before);
  if (members.bin >= 0 && weights[members.bin]) {  // else all that is cut off has no weight
    const u64 border = border_in(at, members, true, ranks, before);
    u64 kept = 0;
    members.low = border;
    members.each(at, [&](u64, float x) { kept += scale.weight(x); });
    sum_in_block(kept, all);
    weight = threadIdx.x < members.bin ? weight : threadIdx.x == members.bin ? all : 0;
  }
  u64 border = members.low;
  sum_in_block(weight, all);
  const double wanted = __ldcg(at.top_p + row) * (double)all;
  before = 0;
  members.bin = crossing(weight, wanted, before);
  if (members.bin >= 0) border = border_in(at, members, false, wanted, before);
  if (threadIdx.x == 0) between[BORDER] = border;
}

// ---- the draw ----
//
// As in `choose_any`: each block has neighbouring tokens; first a block is drawn by its share, then one of its tokens.

extern "C" __global__ void __launch_bounds__(SIZE, 1) choose_nucleus(const Buffers at) {
  __shared__ u64 target, before;
  __shared__ int drawn_part, found;
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS, lane = threadIdx.x % 32;
  let_next_start();
  wait_for_last();
  const bool held = is_held(at, row);
  const Scale scale = scale_of(at, row);
  u64* between = at.between + (i64)row * SCRATCH;
  const u64 border = __ldcg(between + BORDER), largest = __ldcg(between + LARGEST);
  const auto weight = [&](int chunk, int place) -> u64 {
    const int token = chunk * CHUNK + place;
    if (place >= CHUNK || token >= VOCAB) return 0;
    const float x = score(at, row, held, token);
    return key_of(x, token) >= border ? scale.weight(x) : 0;
  };
  u64 own = 0, all;
  for (int i = 0; i < OWN; i++) own += weight(part, i * SIZE + threadIdx.x);
  sum_in_block(own, all);
  if (threadIdx.x == 0) between[part] = all;
  if (!is_last(at, row)) return;
  if (threadIdx.x < 32) {
    const u64 reached = sum_in_warp(__ldcg(between + lane)), whole = __shfl_sync(~0u, reached, 31);
    u64 wanted = (u64)(__ldcg(at.uniforms + row * at.length + next_place(at, row)) * (double)whole);
    if (wanted >= whole) wanted = whole - 1;  // it was rounded up
    const u32 beyond = whole ? __ballot_sync(~0u, reached > wanted) : 0;
    const int chosen = beyond ? __ffs(beyond) - 1 : 0;
    const u64 lower = __shfl_sync(~0u, reached, chosen ? chosen - 1 : 0);
    if (lane == 0) {
      drawn_part = chosen; target = wanted; before = chosen ? lower : 0;
      found = token_of(largest);  // where none has a weight: logits are no numbers
      if (whole) found = VOCAB;
    }
  }
  __syncthreads();
  u64 lower = before;
  for (int i = 0; i < OWN; i++) {
    const int place = i * SIZE + threadIdx.x;
    const u64 reached = lower + sum_in_block(weight(drawn_part, place), all);
    if (reached > target) atomicMin(&found, drawn_part * CHUNK + place);
    lower += all;
  }
  __syncthreads();
  if (threadIdx.x == 0) keep(at, row, found, logit_of(largest));
}
