// The CPU lowering of a whole group: shrink, expand and, where it is asked for, the siblings' own layers, in one op.
//
//     S[token, lane] = x[token] @ A[lane]                               lanes of the windows in use, no others
//     out            = y (or x @ W.T + bias)
//                      + sum over pairs of weight * scale * (S @ B + LoRA bias)
//
// Only rows of A and B that a token's adapters own are read. Sums are float32, in an order that depends on nothing but
// the width of the layer: the bits of a row depend neither on the other rows, nor on their number, nor on the number of
// threads. (The layers' own product is that of ATen beyond FEW_TOKENS, which promises less.)
//
// See ops.py for every argument, with a worked example. Compiled when it is first needed: cpp.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FEW_TOKENS = 16;     // up to here the layers' own product is ours, beyond it ATen's
constexpr int64_t COLUMNS = 128;       // of a tile of the output
constexpr int64_t TOKENS = 32;         // of a tile: 16 KiB of float32, which the first-level cache holds
constexpr int64_t UNIT = 16;           // columns that one thread gets at least
constexpr int64_t LANES = 4;           // rank rows that one thread gets at least
constexpr int64_t SMALL = 32 * 1024;   // multiplications that aren't worth waking another thread for

// ------------------------------------------------------------------------------------------------ vectors

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));

struct bf16 {
  uint16_t bits;
};
typedef _Float16 f16;

inline float to_float(float v) { return v; }
inline float to_float(f16 v) { return static_cast<float>(v); }
inline float to_float(bf16 v) {
  uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline void put(float* at, float v) { *at = v; }
inline void put(f16* at, float v) { *at = static_cast<f16>(v); }
inline void put(bf16* at, float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  at->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec load(const float* p) {
  vec out;
  std::memcpy(&out, p, sizeof(vec));
  return out;
}
inline vec load(const f16* p) {
  typedef f16 half __attribute__((vector_size(2 * WIDTH)));
  half v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vec);
}
inline vec load(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * WIDTH)));
  typedef uint32_t whole __attribute__((vector_size(4 * WIDTH)));
  half v;
  std::memcpy(&v, p, sizeof(v));
  whole wide = __builtin_convertvector(v, whole) << 16;
  vec out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

inline float sum(vec v) {  // always the same tree
  float lanes[WIDTH];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ------------------------------------------------------------------------------------------------ products

// `out[j][r] = x[r] . m[j]`: R rows of x with J rows of a matrix, whose rows lie `stride` apart
template <int R, int J, class T>
inline void dots(const float* const* x, const T* m, int64_t stride, int64_t k, float (&out)[J][R]) {
  vec acc[J][R] = {};
  int64_t at = 0;
  for (; at + WIDTH <= k; at += WIDTH) {
    vec rows[J];
    for (int j = 0; j < J; ++j) rows[j] = load(m + j * stride + at);
    for (int r = 0; r < R; ++r) {
      vec xs = load(x[r] + at);
      for (int j = 0; j < J; ++j) acc[j][r] += rows[j] * xs;
    }
  }
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < R; ++r) out[j][r] = sum(acc[j][r]);
  for (; at < k; ++at)
    for (int j = 0; j < J; ++j)
      for (int r = 0; r < R; ++r) out[j][r] = __builtin_fmaf(to_float(m[j * stride + at]), x[r][at], out[j][r]);
}

// `out[token][j] = x[token] . m[j]` for `tokens` rows of x and `count` rows of m, in blocks that fill the registers; the
// rows of out lie `width` apart
template <class T>
[[gnu::noinline]] void products(const float* const* x, int64_t tokens, const T* m, int64_t stride, int64_t k, int64_t count,
                                float* out, int64_t width) {
  auto block = [&]<int R, int J>(int64_t token, int64_t j) {
    float found[J][R];
    dots<R, J>(x + token, m + j * stride, stride, k, found);
    for (int a = 0; a < J; ++a)
      for (int r = 0; r < R; ++r) out[(token + r) * width + j + a] = found[a][r];
  };
  auto rows = [&]<int R, int J>(int64_t token) {
    int64_t j = 0;
    for (; j + J <= count; j += J) block.template operator()<R, J>(token, j);
    for (; j < count; ++j) block.template operator()<R, 1>(token, j);
  };
  int64_t token = 0;
  for (; token + 8 <= tokens; token += 8) rows.template operator()<8, 2>(token);
  for (; token + 4 <= tokens; token += 4) rows.template operator()<4, 4>(token);
  for (; token + 2 <= tokens; token += 2) rows.template operator()<2, 4>(token);
  for (; token < tokens; ++token) rows.template operator()<1, 4>(token);
}

// `tile[r] += s[r] @ b` for R rows; s[r]: `rank` numbers; b: `[rank, >= columns]`; tile rows lie COLUMNS apart
template <int R, class T>
[[gnu::noinline]] void add_products(float* const* tile, const float* const* s, const T* b, int64_t stride, int64_t rank, int64_t columns) {
  constexpr int VECS = 4;
  int64_t c = 0;
  for (; c + VECS * WIDTH <= columns; c += VECS * WIDTH) {
    vec acc[R][VECS];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECS; ++v) acc[r][v] = load(tile[r] + c + v * WIDTH);
    for (int64_t lane = 0; lane < rank; ++lane) {
      vec row[VECS];
      for (int v = 0; v < VECS; ++v) row[v] = load(b + lane * stride + c + v * WIDTH);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECS; ++v) acc[r][v] += row[v] * s[r][lane];
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECS; ++v) std::memcpy(tile[r] + c + v * WIDTH, &acc[r][v], sizeof(vec));
  }
  for (int r = 0; r < R; ++r)
    for (int64_t lane = 0; lane < rank; ++lane)
      for (int64_t rest = c; rest < columns; ++rest)
        tile[r][rest] = __builtin_fmaf(to_float(b[lane * stride + rest]), s[r][lane], tile[r][rest]);
}

// ------------------------------------------------------------------------------------------------ routing

struct Window {
  int64_t start, rank, bias_row;  // as in the table of windows
  float scale;
  int64_t lane;  // of the sibling's first lane among the adapter's own
};

// An adapter that some tokens of this call use, and by how much.
struct Use {
  int64_t slot;
  std::vector<int64_t> tokens;  // ascending
  std::vector<float> weights;
  std::vector<Window> windows;  // of each sibling
  int64_t lanes = 0;            // of all siblings
  int64_t s = 0;                // where its block of S begins: `[tokens, lanes]`
};

int64_t integer(const Tensor& table, int64_t at) {
  const void* data = table.const_data_ptr();
  switch (table.scalar_type()) {
    case ScalarType::Short: return static_cast<const int16_t*>(data)[at];
    case ScalarType::Int: return static_cast<const int32_t*>(data)[at];
    case ScalarType::Long: return static_cast<const int64_t*>(data)[at];
    default: STD_TORCH_CHECK(false, "lorafx: a table is of no integer type");
  }
}

std::vector<Use> find_uses(int64_t rows, int64_t row_tokens, int64_t siblings, const Tensor& slots, const Tensor& weights,
                           const Tensor& count, const Tensor& scale, const Tensor& windows) {
  const int64_t entries = integer(count, 0), pairs = slots.size(1);
  const float* weight_of = static_cast<const float*>(weights.const_data_ptr());
  const float* scale_of = static_cast<const float*>(scale.const_data_ptr());
  std::vector<Use> uses;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t entry = row * entries / rows;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t slot = integer(slots, entry * slots.stride(0) + pair * slots.stride(1));
      const float weight = weight_of[entry * weights.stride(0) + pair * weights.stride(1)];
      if (slot < 0 || weight == 0) continue;
      auto use = std::find_if(uses.begin(), uses.end(), [&](const Use& u) { return u.slot == slot; });
      if (use == uses.end()) {
        use = uses.insert(use, Use{slot, {}, {}, {}});
        for (int64_t i = 0; i < siblings; ++i) {
          const int64_t at = slot * windows.stride(0) + i * windows.stride(1), step = windows.stride(2);
          Window w{integer(windows, at), integer(windows, at + step), integer(windows, at + 2 * step),
                   scale_of[slot * scale.stride(0) + i * scale.stride(1)], use->lanes};
          if (w.scale == 0) w.rank = 0, w.bias_row = -1;
          use->lanes += w.rank;
          use->windows.push_back(w);
        }
      }
      const bool again = !use->tokens.empty() && use->tokens.back() >= row * row_tokens;  // one adapter twice in a row
      for (int64_t t = 0; t < row_tokens; ++t) {
        if (again) {
          use->weights[use->weights.size() - row_tokens + t] += weight;
        } else {
          use->tokens.push_back(row * row_tokens + t);
          use->weights.push_back(weight);
        }
      }
    }
  }
  std::erase_if(uses, [](const Use& u) {
    return std::all_of(u.windows.begin(), u.windows.end(), [](const Window& w) { return !w.rank && w.bias_row < 0; });
  });
  return uses;
}

template <class F>
void run(int64_t items, int64_t work, const F& f) {
  if (work <= SMALL || items <= 1) return f(0, items);
  torch::stable::parallel_for(0, items, 1, f);
}

// ------------------------------------------------------------------------------------------------ the group

// One sibling: its output, and either its own layer (weight, bias) or what that layer gave (`given`).
struct Sibling {
  Tensor out;
  int64_t width;
  const void* weight = nullptr;
  int64_t weight_stride = 0;
  const void* bias = nullptr;
  const void* given = nullptr;
  int64_t a_row;  // where its rank rows begin in its matrix A
  const void* a;
  const void* b;
};

template <class T, class W>  // dtype of x and y; of the bank
struct Group {
  int64_t tokens, k;
  std::vector<const float*> x;  // each token's
  std::vector<Sibling> siblings;
  std::vector<Use> uses;
  std::vector<float> s;

  void shrink() {
    struct Item {
      const Use* use;
      int64_t sibling, lane, lanes, first, last;
    };
    int64_t size = 0, work = 0;
    for (Use& use : uses) {
      use.s = size;
      size += use.lanes * static_cast<int64_t>(use.tokens.size());
    }
    s.resize(size);
    std::vector<Item> items;
    for (const Use& use : uses) {
      const int64_t count = use.tokens.size(), lanes = count < TOKENS ? LANES : 4 * LANES;
      work += count * use.lanes * k;
      for (int64_t first = 0; first < count; first += 2 * TOKENS)
        for (int64_t i = 0; i < static_cast<int64_t>(siblings.size()); ++i)
          for (int64_t lane = 0; lane < use.windows[i].rank; lane += lanes)
            items.push_back({&use, i, lane, std::min(lanes, use.windows[i].rank - lane), first,
                             std::min(first + 2 * TOKENS, count)});
    }
    run(items.size(), work, [&](int64_t begin, int64_t end) {
      const float* rows[2 * TOKENS];
      for (int64_t n = begin; n < end; ++n) {
        const Item& item = items[n];
        const Use& use = *item.use;
        const Window& window = use.windows[item.sibling];
        const Sibling& sibling = siblings[item.sibling];
        for (int64_t t = item.first; t < item.last; ++t) rows[t - item.first] = x[use.tokens[t]];
        const W* a = static_cast<const W*>(sibling.a) + (sibling.a_row + window.start + item.lane) * k;
        float* block = s.data() + use.s + item.first * use.lanes + window.lane + item.lane;
        const float* weights = use.weights.data() + item.first;
        products(rows, item.last - item.first, a, k, k, item.lanes, block, use.lanes);
        for (int64_t token = 0; token < item.last - item.first; ++token)
          for (int64_t lane = 0; lane < item.lanes; ++lane)
            block[token * use.lanes + lane] *= weights[token] * window.scale;
      }
    });
  }

  // What the adapters add to columns [c, c + columns) of sibling i, for tokens [first, last); tile rows: those tokens
  void expand(int64_t i, int64_t c, int64_t columns, int64_t first, int64_t last, float (*tile)[COLUMNS]) const {
    const int64_t width = siblings[i].width;
    const W* b = static_cast<const W*>(siblings[i].b) + c;
    for (const Use& use : uses) {
      const Window& w = use.windows[i];
      const auto from = std::lower_bound(use.tokens.begin(), use.tokens.end(), first);
      const auto to = std::lower_bound(from, use.tokens.end(), last);
      const float* block = s.data() + use.s + w.lane;
      for (auto at = from; w.rank && at != to;) {
        const int64_t n = at - use.tokens.begin();
        const bool four = to - at >= 4;
        float* rows[4];
        const float* lanes[4];
        for (int r = 0; r < (four ? 4 : 1); ++r) {
          rows[r] = tile[at[r] - first];
          lanes[r] = block + (n + r) * use.lanes;
        }
        if (four)
          add_products<4>(rows, lanes, b + w.start * width, width, w.rank, columns);
        else
          add_products<1>(rows, lanes, b + w.start * width, width, w.rank, columns);
        at += four ? 4 : 1;
      }
      for (auto at = from; w.bias_row >= 0 && at != to; ++at) {
        const float factor = use.weights[at - use.tokens.begin()] * w.scale;
        float* row = tile[*at - first];
        for (int64_t j = 0; j < columns; ++j) row[j] = __builtin_fmaf(to_float(b[w.bias_row * width + j]), factor, row[j]);
      }
    }
  }

  void fill(int64_t i, int64_t c, int64_t columns, int64_t first, int64_t last) const {
    float tile[TOKENS][COLUMNS];
    const Sibling& one = siblings[i];
    if (one.weight) {
      const T* rows = static_cast<const T*>(one.weight) + c * one.weight_stride;
      const T* bias = static_cast<const T*>(one.bias);
      products(x.data() + first, last - first, rows, one.weight_stride, k, columns, tile[0], COLUMNS);
      for (int64_t token = first; bias && token < last; ++token)
        for (int64_t j = 0; j < columns; ++j) tile[token - first][j] += to_float(bias[c + j]);
    } else {
      const T* given = static_cast<const T*>(one.given);
      for (int64_t token = first; token < last; ++token)
        for (int64_t j = 0; j < columns; ++j) tile[token - first][j] = to_float(given[token * one.width + c + j]);
    }
    expand(i, c, columns, first, last, tile);
    T* out = static_cast<T*>(one.out.mutable_data_ptr());
    for (int64_t token = first; token < last; ++token)
      for (int64_t j = 0; j < columns; ++j) put(out + token * one.width + c + j, tile[token - first][j]);
  }

  // All columns of all siblings, in units that stand side by side, for a range of tokens.
  void fill_units(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    int64_t before = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(siblings.size()); ++i) {
      const int64_t width = siblings[i].width, units = (width + UNIT - 1) / UNIT;
      const int64_t from = std::max(begin - before, int64_t(0)) * UNIT;
      const int64_t to = std::min((end - before) * UNIT, width);
      for (int64_t c = from; c < to; c += COLUMNS)
        for (int64_t token = first; token < last; token += TOKENS)
          fill(i, c, std::min(COLUMNS, to - c), token, std::min(token + TOKENS, last));
      before += units;
    }
  }

  void compute() {
    if (!uses.empty()) shrink();
    int64_t units = 0, outs = 0, rank = 0;
    for (const Sibling& one : siblings) {
      units += (one.width + UNIT - 1) / UNIT;
      outs += one.width * (one.weight ? k : 1);
    }
    for (const Use& use : uses) rank += use.lanes;
    const int64_t work = tokens * outs + tokens * units * UNIT * rank, blocks = (tokens + TOKENS - 1) / TOKENS;
    if (blocks >= 2 * static_cast<int64_t>(torch::stable::get_num_threads()))
      run(blocks, work, [&](int64_t begin, int64_t end) {
        fill_units(0, units, begin * TOKENS, std::min(end * TOKENS, tokens));
      });
    else
      run(units, work, [&](int64_t begin, int64_t end) { fill_units(begin, end, 0, tokens); });
  }
};

// x @ weight.T + bias, by ATen.
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight),
      bias ? torch::stable::detail::from(std::optional<Tensor>(*bias)) : torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T, class W>
std::vector<Tensor> compute(const std::vector<Tensor>& ys, const std::vector<Tensor>& layers, const std::vector<Tensor>& biases,
                            const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                            const std::vector<int64_t>& caps, std::vector<Use> uses) {
  Group<T, W> group;
  group.k = x.size(-1);
  group.tokens = x.numel() / group.k;
  group.uses = std::move(uses);
  std::vector<Tensor> outs, kept;  // kept: what ATen gave, alive until it is read
  int64_t row = 0;
  for (size_t i = 0; i < caps.size(); ++i) {
    Sibling one;
    one.width = b[i].size(1);
    if (layers.empty()) {
      one.given = ys[i].const_data_ptr();
    } else if (group.tokens <= FEW_TOKENS) {
      one.weight = layers[i].const_data_ptr();
      one.weight_stride = layers[i].stride(0);
      one.bias = biases.empty() ? nullptr : biases[i].const_data_ptr();
    } else {
      kept.push_back(linear(x, layers[i], biases.empty() ? nullptr : &biases[i]));
      one.given = kept.back().const_data_ptr();
    }
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = one.width;
    // In place where the base output is ours: nothing else reads it.
    one.out = kept.empty() ? torch::stable::new_empty(x, sizes, layers.empty() ? ys[i].scalar_type() : x.scalar_type()) : kept.back();
    one.a = a.size() == 1 ? a[0].const_data_ptr() : a[i].const_data_ptr();
    one.a_row = a.size() == 1 ? row : 0;
    one.b = b[i].const_data_ptr();
    row += caps[i];
    outs.push_back(one.out);
    group.siblings.push_back(one);
  }
  if (group.tokens == 0 || (!kept.empty() && group.uses.empty())) return outs;
  std::vector<float> wide;  // x in float32
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const float* rows;
  if constexpr (std::is_same_v<T, float>) {
    rows = data;
  } else {
    wide.resize(x.numel());
    for (int64_t i = 0; i < static_cast<int64_t>(wide.size()); ++i) wide[i] = to_float(data[i]);
    rows = wide.data();
  }
  for (int64_t t = 0; t < group.tokens; ++t) group.x.push_back(rows + t * group.k);
  group.compute();
  return outs;
}

std::vector<Tensor> routed(std::vector<Tensor> ys, std::vector<Tensor> layers, std::vector<Tensor> biases, Tensor x,
                           std::vector<Tensor> a, std::vector<Tensor> b, std::vector<int64_t> caps, Tensor slots,
                           Tensor weights, Tensor count, Tensor scale, Tensor windows) {
  const int64_t k = x.size(-1), rows = x.size(0);
  STD_TORCH_CHECK(x.dim() >= 2 && x.is_contiguous(), "lorafx: x must be contiguous, with a batch dimension");
  for (const auto& list : {ys, a, b})
    for (const Tensor& t : list) STD_TORCH_CHECK(t.is_contiguous(), "lorafx: ys, a and b must be contiguous");
  for (const Tensor& t : layers)
    STD_TORCH_CHECK(t.stride(1) == 1 && t.size(1) == k && t.scalar_type() == x.scalar_type(),
                    "lorafx: a layer's weight must be of x's dtype, [out, in], its rows contiguous");
  for (const Tensor& t : a)
    STD_TORCH_CHECK(t.size(1) == k && t.scalar_type() == b[0].scalar_type(), "lorafx: a and b must be of one dtype");
  for (size_t i = 0; i < ys.size(); ++i)
    STD_TORCH_CHECK(ys[i].scalar_type() == x.scalar_type() && ys[i].size(-1) == b[i].size(1), "lorafx: ys must be as x and b say");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && scale.scalar_type() == ScalarType::Float,
                  "lorafx: weights and scale must be float32");
  const int64_t row_tokens = rows ? x.numel() / k / rows : 0;
  std::vector<Use> uses = find_uses(rows, row_tokens, caps.size(), slots, weights, count, scale, windows);
  auto with = [&]<class T>() {
    switch (b[0].scalar_type()) {
      case ScalarType::Float: return compute<T, float>(ys, layers, biases, x, a, b, caps, std::move(uses));
      case ScalarType::BFloat16: return compute<T, bf16>(ys, layers, biases, x, a, b, caps, std::move(uses));
      case ScalarType::Half: return compute<T, f16>(ys, layers, biases, x, a, b, caps, std::move(uses));
      default: STD_TORCH_CHECK(false, "lorafx: the adapters must be float32, bfloat16 or float16");
    }
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return with.template operator()<float>();
    case ScalarType::BFloat16: return with.template operator()<bf16>();
    case ScalarType::Half: return with.template operator()<f16>();
    default: STD_TORCH_CHECK(false, "lorafx: x must be float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorafx, CPU, m) { m.impl("routed_cpp", TORCH_BOX(&routed)); }
