// Chooses the next token of every row from its logits: what `sampling.sample` chooses on the host, from the same numbers.
//
//     B rows    V vocabulary    C candidates, at most 64    L cache length
//
// Given as macros: VOCAB, CANDIDATES. PARTS blocks of 1024 threads share a row's logits, and the one that is done last
// chooses. A logit and its token are one number of 64 bits, the key: a larger logit is a larger key, and of equal
// logits the lower token has it, so that no two keys of a row are equal. A logit that is no number has the largest.
// Follows kernel_basics.cu.

typedef unsigned long long u64;

#define PARTS 32
#define SIZE 1024  // threads of a block
#define GROUPS (PARTS * 32)
#define MEMBERS ((VOCAB + GROUPS - 1) / GROUPS)  // of a group
#define SLACK 32   // more groups than there are candidates that may be looked through
#define ROOM 1024  // for tokens among which the candidates are
#define SCRATCH (GROUPS + 2 * SIZE)  // numbers that a row has room for, of which most kernels use GROUPS
#define NOTHING __int_as_float(0xff800000)  // -inf

struct Buffers {
  const float* logits;      // (B, V)
  i64* tokens;              // (B, 1): the last token, and afterwards the next one
  int* last_index;          // (B,): its position, likewise
  i64* history;             // (B, L)
  const int* limit;         // (B,): the last position that may be filled
  const u8* goes_on;        // (V,): 0 for a token that ends its row
  float* chosen_logit;      // (B, 1)
  const float* penalty;     // (B, 1); null where none is wanted
  float* seen;              // (B, V): 1, or the penalty of a token that has been seen; null likewise
  const double* sharpness;  // (B, 1): 1 / temperature
  const double* uniforms;   // (B, L): a number in [0, 1) for each position
  const double* rank_bias;  // (B, C): 0 for the ranks that are kept, -inf for the others
  const double* top_p;      // (B, 1)
  const i64* top_k;         // (B, 1)
  const int* earliest;      // (B,): the first position at which a token may end its row; null where any may
  u64* between;             // (B, SCRATCH): what blocks give to the last one
  u32* done;                // (B,): zeros, and zeros again afterwards
  i64 length;               // L
};

// ---- keys ----

__device__ __forceinline__ u32 ordered(float x) {
  if (x != x) return ~0u;
  const u32 bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float plain(u32 order) { return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order); }
__device__ __forceinline__ u64 key_of(float x, int token) { return (u64)ordered(x) << 32 | (u32)~token; }
__device__ __forceinline__ int token_of(u64 key) { return (int)~(u32)key; }
__device__ __forceinline__ float logit_of(u64 key) { return plain((u32)(key >> 32)); }

__device__ __forceinline__ int next_place(const Buffers& at, int row) {
  const int next = __ldcg(at.last_index + row) + 1, limit = __ldcg(at.limit + row);
  return next < limit ? next : limit;
}
// Whether a row is too short yet to be ended.
__device__ __forceinline__ bool is_held(const Buffers& at, int row) {
  return at.earliest && next_place(at, row) < __ldcg(at.earliest + row);
}
__device__ __forceinline__ float penalised(float logit, float penalty) {
  return logit > 0.0f ? logit / penalty : logit * penalty;
}
// A token's logit, or what its penalty leaves of it; nothing is left of one that would end a row that is held.
__device__ __forceinline__ float score(const Buffers& at, int row, bool held, int token) {
  const i64 place = (i64)row * VOCAB + token;
  if (held && !__ldcg(at.goes_on + token)) return NOTHING;
  const float logit = __ldcg(at.logits + place);
  return at.seen ? penalised(logit, __ldcg(at.seen + place)) : logit;
}

// ---- what threads know together ----

__device__ __forceinline__ u64 largest_of_warp(u64 key) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(~0u, key, o);
    key = other > key ? other : key;
  }
  return key;
}
__device__ __forceinline__ u64 largest_of_block(u64 key) {
  __shared__ u64 of_warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  key = largest_of_warp(key);
  __syncthreads();
  if (lane == 0) of_warps[warp] = key;
  __syncthreads();
  return largest_of_warp(of_warps[lane]);
}
// The sum up to and with each lane's.
template <class T> __device__ __forceinline__ T sum_in_warp(T x) {
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const T before = __shfl_up_sync(~0u, x, o);
    if (threadIdx.x % 32 >= o) x += before;
  }
  return x;
}
// The sum up to and with each thread's; `all` gets that of the block.
template <class T> __device__ __forceinline__ T sum_in_block(T x, T& all) {
  __shared__ T of_warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T reached = sum_in_warp(x);
  __syncthreads();
  if (lane == 31) of_warps[warp] = reached;
  __syncthreads();
  const T warps = sum_in_warp(of_warps[lane]), before = __shfl_up_sync(~0u, warps, 1);
  all = __shfl_sync(~0u, warps, 31);
  const T own = __shfl_sync(~0u, lane ? before : T(0), warp);
  return own + reached;
}
// Whether this block is the last of its row; it may then read what the others have written.
__device__ __forceinline__ bool is_last(const Buffers& at, int row) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(at.done + row, 1u) == PARTS - 1;
    if (last) at.done[row] = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- the end of every choice ----

// By one thread. A row whose token does not go on repeats it, one at its limit stays there. Logits that are not finite
// are shown to the host, whatever was chosen.
__device__ __forceinline__ void keep(const Buffers& at, int row, int chosen, float largest) {
  const i64 given = __ldcg(at.tokens + row), token = __ldcg(at.goes_on + given) ? chosen : given;
  const int place = next_place(at, row);
  at.tokens[row] = token;
  at.last_index[row] = place;
  at.history[row * at.length + place] = token;
  at.chosen_logit[row] = largest - largest == 0.0f ? __ldcg(at.logits + (i64)row * VOCAB + chosen) : largest;
  if (at.seen) at.seen[(i64)row * VOCAB + token] = __ldcg(at.penalty + row);
}

// ---- the likeliest token ----

extern "C" __global__ void __launch_bounds__(SIZE, 1) choose_greedy(const Buffers at) {
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
  let_next_start();
  wait_for_last();
  const bool held = is_held(at, row);
  u64 own = 0;
  for (int token = part * SIZE + threadIdx.x; token < VOCAB; token += PARTS * SIZE) {
    const u64 key = key_of(score(at, row, held, token), token);
    own = key > own ? key : own;
  }
  own = largest_of_block(own);
  u64* between = at.between + (i64)row * SCRATCH;
  if (threadIdx.x == 0) between[part] = own;
  if (!is_last(at, row) || threadIdx.x >= 32) return;
  own = largest_of_warp(__ldcg(between + threadIdx.x));
  if (threadIdx.x == 0) keep(at, row, token_of(own), logit_of(own));
}

// ---- one of the top k, or of their nucleus ----
//
// Tokens whose numbers leave the same rest by GROUPS are a group. The C largest of all tokens are in the C groups with
// the largest keys, so few are looked at twice.

// A bound that C of the groups' keys reach, one a thread, and at most SLACK more: bit by bit from the highest.
__device__ __forceinline__ u64 bound_of_groups(u64 group) {
  u64 bound = 0;
  for (int bit = 63; bit >= 0; bit--) {
    const u64 raised = bound | 1ull << bit;
    const int count = __syncthreads_count(group >= raised);
    if (count < CANDIDATES) continue;
    bound = raised;
    if (count <= CANDIDATES + SLACK) break;
  }
  return bound;
}

// The tokens of some groups, those that reach the bound in `found`, as far as there is room; how many there are.
__device__ __forceinline__ int collect(const Buffers& at, int row, bool held, const int* groups, int count, u64 bound,
                                       u64* found) {
  __shared__ int reached;
  __syncthreads();
  if (threadIdx.x == 0) reached = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count * MEMBERS; i += SIZE) {
    const int token = groups[i % count] + i / count * GROUPS;
    if (token >= VOCAB) continue;
    const u64 key = key_of(score(at, row, held, token), token);
    if (key < bound) continue;
    const int place = atomicAdd(&reached, 1);
    if (place < ROOM) found[place] = key;
  }
  __syncthreads();
  return reached;
}

// The C largest of `count` keys, the largest first: each goes to the place that as many keys as are larger say.
__device__ __forceinline__ void sort(const u64* found, int count, u64* top) {
  for (int first = 0; first < count; first += SIZE / 8) {
    const int own = first + threadIdx.x / 8;
    int larger = 0;
    if (own < count)
      for (int i = threadIdx.x % 8; i < count; i += 8) larger += found[i] > found[own];
#pragma unroll
    for (int o = 4; o; o >>= 1) larger += __shfl_xor_sync(~0u, larger, o);
    if (own < count && threadIdx.x % 8 == 0 && larger < CANDIDATES) top[larger] = found[own];
  }
  __syncthreads();
}

// By one warp, two ranks a lane: which of the candidates the row's uniform number says.
__device__ __forceinline__ int drawn(const Buffers& at, int row, const u64* top) {
  __shared__ double shares[64];
  const int lane = threadIdx.x % 32;
  const double sharpness = __ldcg(at.sharpness + row), nucleus = __ldcg(at.top_p + row);
  double weights[2], reached[2], all = 0.0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int rank = i * 32 + lane;
    const bool kept = rank < CANDIDATES && __ldcg(at.rank_bias + (i64)row * CANDIDATES + rank) == 0.0;
    weights[i] = kept ? exp(((double)logit_of(top[rank]) - (double)logit_of(top[0])) * sharpness) : 0.0;
    reached[i] = all + sum_in_warp(weights[i]);
    all = __shfl_sync(~0u, reached[i], 31);
  }
  double before = 0.0, kept_all = 0.0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const double shifted = __shfl_up_sync(~0u, reached[i], 1);
    const double own_before = lane ? shifted : before;
    before = __shfl_sync(~0u, reached[i], 31);
    const double share = own_before / all < nucleus ? weights[i] : 0.0;
    shares[i * 32 + lane] = share;
    kept_all += share;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) kept_all += __shfl_xor_sync(~0u, kept_all, o);
  __syncwarp();
  // The running sum that is drawn from goes by token, as on the host: of the tokens that have less than the target
  // before them, the one with the highest number.
  const double target = __ldcg(at.uniforms + row * at.length + next_place(at, row)) * kept_all;
  int chosen = -1;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int rank = i * 32 + lane;
    if (rank >= CANDIDATES || !(shares[rank] > 0.0)) continue;
    double lower = 0.0;
    for (int other = 0; other < CANDIDATES; other++)
      if (token_of(top[other]) < token_of(top[rank])) lower += shares[other];
    if (lower <= target) chosen = max(chosen, token_of(top[rank]));
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) chosen = max(chosen, __shfl_xor_sync(~0u, chosen, o));
  return chosen < 0 ? token_of(top[0]) : chosen;  // no number reaches a target that is none
}

extern "C" __global__ void __launch_bounds__(SIZE, 1) choose_top_k(const Buffers at) {
  __shared__ u64 keys[32][33], found[ROOM], top[64];
  __shared__ int groups[CANDIDATES + SLACK], chosen_groups;
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  let_next_start();
  wait_for_last();
  const bool held = is_held(at, row);
  u64 own = 0;
  for (int token = part * 32 + lane + warp * GROUPS; token < VOCAB; token += 32 * GROUPS) {
    const u64 key = key_of(score(at, row, held, token), token);
    own = key > own ? key : own;
  }
  keys[warp][lane] = own;
  __syncthreads();
  own = largest_of_warp(keys[lane][warp]);
  u64* between = at.between + (i64)row * SCRATCH;
  if (lane == 0) between[part * 32 + warp] = own;
  if (threadIdx.x == 0) chosen_groups = 0;
  if (!is_last(at, row)) return;
  own = __ldcg(between + threadIdx.x);
  u64 bound = bound_of_groups(own);
  if (own >= bound) groups[atomicAdd(&chosen_groups, 1)] = threadIdx.x;
  __syncthreads();
  int count = collect(at, row, held, groups, chosen_groups, bound, found);
  for (u64 beyond = ~0ull; count > ROOM;) {  // seldom: so many in these groups are near each other
    const u64 between_them = bound + (beyond - bound) / 2;
    const int reached = collect(at, row, held, groups, chosen_groups, between_them, found);
    if (reached >= CANDIDATES) { bound = between_them; count = reached; } else { beyond = between_them; }
    if (count <= ROOM) collect(at, row, held, groups, chosen_groups, bound, found);
  }
  sort(found, count, top);
  if (warp > 0) return;
  const int chosen = drawn(at, row, top);
  if (lane == 0) keep(at, row, chosen, logit_of(top[0]));
}

// ---- any token ----
//
// Each block has neighbouring tokens and gives their largest logit and the sum of their weights beside it: first a
// block's tokens are drawn by their share, then one of them.

#define CHUNK ((VOCAB + PARTS - 1) / PARTS)
#define OWN ((CHUNK + SIZE - 1) / SIZE)  // tokens of a thread

extern "C" __global__ void __launch_bounds__(SIZE, 1) choose_any(const Buffers at) {
  __shared__ double target, before;
  __shared__ int drawn_part, found, last_one;
  __shared__ float largest;
  const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS, lane = threadIdx.x % 32;
  let_next_start();
  wait_for_last();
  const bool held = is_held(at, row);
  const double sharpness = __ldcg(at.sharpness + row);
  float scores[OWN];
  u64 own = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int place = i * SIZE + threadIdx.x, token = part * CHUNK + place;
    const bool there = place < CHUNK && token < VOCAB;
    scores[i] = there ? score(at, row, held, token) : NOTHING;
    if (there) { const u64 key = key_of(scores[i], token); own = key > own ? key : own; }
  }
  own = largest_of_block(own);
  double weight = 0.0, all;
#pragma unroll
  for (int i = 0; i < OWN; i++) weight += exp(((double)scores[i] - (double)logit_of(own)) * sharpness);
  sum_in_block(own ? weight : 0.0, all);
  u64* between = at.between + (i64)row * SCRATCH;
  if (threadIdx.x == 0) { between[part] = own; between[PARTS + part] = (u64)__double_as_longlong(all); }
  if (!is_last(at, row)) return;
  if (threadIdx.x < 32) {
    const u64 key = __ldcg(between + lane), most = largest_of_warp(key);
    const double sum = __longlong_as_double((i64)__ldcg(between + PARTS + lane));
    const double share = key ? sum * exp(((double)logit_of(key) - (double)logit_of(most)) * sharpness) : 0.0;
    const double reached = sum_in_warp(share), wanted = __ldcg(at.uniforms + row * at.length + next_place(at, row)) * __shfl_sync(~0u, reached, 31);
    const u32 beyond = __ballot_sync(~0u, reached > wanted), some = __ballot_sync(~0u, share > 0.0);
    const int chosen = beyond ? __ffs(beyond) - 1 : some ? 31 - __clz(some) : 0;  // the last: the sum was rounded down
    const double lower = __shfl_sync(~0u, reached, chosen ? chosen - 1 : 0);
    if (lane == 0) {
      drawn_part = chosen; target = wanted; before = chosen ? lower : 0.0; largest = logit_of(most);
      found = VOCAB; last_one = chosen * CHUNK;
    }
  }
  __syncthreads();
  double lower = before;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int place = i * SIZE + threadIdx.x, token = drawn_part * CHUNK + place;
    const bool there = place < CHUNK && token < VOCAB;
    const double own_weight = there ? exp(((double)score(at, row, held, token) - (double)largest) * sharpness) : 0.0;
    const double reached = lower + sum_in_block(own_weight, all);
    if (own_weight > 0.0) { atomicMax(&last_one, token); if (reached > target) atomicMin(&found, token); }
    lower += all;
  }
  __syncthreads();
  if (threadIdx.x == 0) keep(at, row, found < VOCAB ? found : last_one, largest);
}
