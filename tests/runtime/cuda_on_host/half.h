// In the place of what decode_kernels.cu has before its attention: its 16-bit numbers and its loads are assembly.
typedef _Float16 half;
static inline float widen(u16 h) { return (float)same_bits<half>(h); }
static inline u16 narrow(float f) { return same_bits<u16>((half)f); }
static inline float low(u32 pair) { return widen((u16)(pair & 0xffff)); }
static inline float high(u32 pair) { return widen((u16)(pair >> 16)); }
static inline Word4 load_weights(const void* p) { return *(const Word4*)p; }
static inline float load_fresh1(const float* p) { return *p; }
static inline Float4 load_fresh4(const float* p) { return *(const Float4*)p; }
template <int bits> static inline int place(int e) { return e; }
