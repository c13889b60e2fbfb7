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
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has no such name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FEW_TOKENS = 16;     // up to here the layers' own product is ours, beyond it ATen's
constexpr int64_t COLUMNS = 128;       // of a tile of the output
constexpr int64_t TOKENS = 32;         // of a tile: 16 KiB of float32, which the first-level cache holds
constexpr int64_t UNIT = 16;           // columns that one thread gets at least
constexpr int64_t LANES = 4;           // rank rows that one thread gets at least
constexpr int64_t AHEAD = 2;           // blocks of rows to fetch before they are needed
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

inline vec load(const float* p) {
  vec out;
  std::memcpy(&out, p, sizeof(vec));
  return out;
}
inline vec load(const Half* p) {
  vec out;
  for (int i = 0; i < WIDTH; ++i) out[i] = static_cast<float>(p[i]);
  return out;
}
inline vec load(const BFloat16* p) {
  typedef uint16_t half __attribute__((vector_size(2 * WIDTH)));
  typedef uint32_t whole __attribute__((vector_size(4 * WIDTH)));
  half v;
  std::memcpy(&v, p, sizeof(v));
  whole wide = __builtin_convertvector(v, whole) << 16;
  vec out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

template <int N>
inline float sum(const float* lanes) {  // always the same tree
  if constexpr (N == 1) {
    float out;
    std::memcpy(&out, lanes, sizeof(float));
    return out;
  } else {
    typedef float part __attribute__((vector_size(2 * N)));
    part low, high;
    std::memcpy(&low, lanes, sizeof(part));
    std::memcpy(&high, lanes + N / 2, sizeof(part));
    low += high;
    return sum<N / 2>(reinterpret_cast<const float*>(&low));
  }
}

// ------------------------------------------------------------------------------------------------ products

// `out[j][r] = x[r] . m[j]`: R rows of x with J rows of a matrix, whose rows lie `stride` apart
template <int R, int J, class T>
inline void dots(const float* const* x, const T* m, int64_t stride, int64_t k, float (&out)[J][R]) {
  vec acc[J][R] = {};
  int64_t at = 0;
  for (; at + WIDTH <= k; at += WIDTH) {
    vec rows[J];
    for (int j = 0; j < J; ++j) {
      rows[j] = load(m + j * stride + at);
      __builtin_prefetch(m + (AHEAD * J + j) * stride + at);  // of a matrix that comes from memory, row after row
    }
    for (int r = 0; r < R; ++r) {
      vec xs = load(x[r] + at);
      for (int j = 0; j < J; ++j) acc[j][r] += rows[j] * xs;
    }
  }
  for (int j = 0; j < J; ++j)
    for (int r = 0; r < R; ++r) out[j][r] = sum<WIDTH>(reinterpret_cast<const float*>(&acc[j][r]));
  for (; at < k; ++at)
    for (int j = 0; j < J; ++j)
      for (int r = 0; r < R; ++r) out[j][r] = __builtin_fmaf(static_cast<float>(m[j * stride + at]), x[r][at], out[j][r]);
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
        tile[r][rest] = __builtin_fmaf(static_cast<float>(b[lane * stride + rest]), s[r][lane], tile[r][rest]);
}

// What depends on the dtype of a matrix, so that all else is compiled once.
struct Kind {
  size_t size;  // bytes of an element
  void (*products)(const float* const* x, int64_t tokens, const void* m, int64_t stride, int64_t k, int64_t count, float* out,
                   int64_t width);
  void (*add_products)(float* const* tile, const float* const* s, int64_t rows, const void* b, int64_t stride, int64_t rank,
                       int64_t columns);
  void (*read)(const void* from, int64_t count, float* to);
  void (*write)(const float* from, int64_t count, void* to);
};

template <class T>
constexpr Kind kind_of{
    sizeof(T),
    [](const float* const* x, int64_t tokens, const void* m, int64_t stride, int64_t k, int64_t count, float* out,
       int64_t width) { products(x, tokens, static_cast<const T*>(m), stride, k, count, out, width); },
    [](float* const* tile, const float* const* s, int64_t rows, const void* b, int64_t stride, int64_t rank, int64_t columns) {
      const T* matrix = static_cast<const T*>(b);
      if (rows == 4) return add_products<4>(tile, s, matrix, stride, rank, columns);
      for (int64_t r = 0; r < rows; ++r) add_products<1>(tile + r, s + r, matrix, stride, rank, columns);
    },
    [](const void* from, int64_t count, float* to) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(static_cast<const T*>(from)[i]);
    },
    [](const float* from, int64_t count, void* to) {
      for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = static_cast<T>(from[i]);
    }};

const Kind& kind(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kind_of<float>;
    case ScalarType::BFloat16: return kind_of<BFloat16>;
    case ScalarType::Half: return kind_of<Half>;
    default: STD_TORCH_CHECK(false, "lorafx: expected float32, bfloat16 or float16");
  }
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
  int64_t width;
  char* out;
  const char* given;
  const char* weight;
  int64_t weight_stride;
  const char* bias;
  const char* a;  // its first rank row of A
  const char* b;
};

struct Group {
  const Kind& base;   // of x, the layers and the outputs
  const Kind& bank;   // of A and B
  int64_t tokens, k;
  std::vector<Use> uses;
  std::vector<Sibling> siblings;
  std::vector<const float*> x;  // each token's
  std::vector<float> s;

  void shrink() {
    struct Item {
      const Use* use;
      int64_t sibling, lane, lanes, first, last;
    };
    int64_t size = 0, work = 0;
    std::vector<Item> items;
    for (Use& use : uses) {
      const int64_t count = use.tokens.size(), lanes = count < TOKENS ? LANES : 4 * LANES;
      use.s = size;
      size += use.lanes * count;
      work += use.lanes * count * k;
      for (int64_t first = 0; first < count; first += 2 * TOKENS)
        for (int64_t i = 0; i < static_cast<int64_t>(siblings.size()); ++i)
          for (int64_t lane = 0; lane < use.windows[i].rank; lane += lanes)
            items.push_back({&use, i, lane, std::min(lanes, use.windows[i].rank - lane), first,
                             std::min(first + 2 * TOKENS, count)});
    }
    s.resize(size);
    run(items.size(), work, [&](int64_t begin, int64_t end) {
      const float* rows[2 * TOKENS];
      for (int64_t n = begin; n < end; ++n) {
        const auto& [use, i, lane, lanes, first, last] = items[n];
        const Window& window = use->windows[i];
        for (int64_t t = first; t < last; ++t) rows[t - first] = x[use->tokens[t]];
        float* block = s.data() + use->s + first * use->lanes + window.lane + lane;
        bank.products(rows, last - first, siblings[i].a + (window.start + lane) * k * bank.size, k, k, lanes, block, use->lanes);
        for (int64_t t = first; t < last; ++t, block += use->lanes)
          for (int64_t at = 0; at < lanes; ++at) block[at] *= use->weights[t] * window.scale;
      }
    });
  }

  // Adds what the adapters give for columns [c, c + columns) of sibling i and tokens [first, last), a row of `tile` each.
  void expand(int64_t i, int64_t c, int64_t columns, int64_t first, int64_t last, float (*tile)[COLUMNS]) const {
    const int64_t width = siblings[i].width;
    const auto row_of_b = [&](int64_t row) { return siblings[i].b + (row * width + c) * bank.size; };
    for (const Use& use : uses) {
      const Window& window = use.windows[i];
      const int64_t from = std::lower_bound(use.tokens.begin(), use.tokens.end(), first) - use.tokens.begin();
      const int64_t to = std::lower_bound(use.tokens.begin() + from, use.tokens.end(), last) - use.tokens.begin();
      for (int64_t n = from; window.rank && n < to; n += 4) {
        float* rows[4];
        const float* lanes[4];
        const int64_t count = std::min(to - n, int64_t(4));
        for (int64_t r = 0; r < count; ++r) {
          rows[r] = tile[use.tokens[n + r] - first];
          lanes[r] = s.data() + use.s + (n + r) * use.lanes + window.lane;
        }
        bank.add_products(rows, lanes, count, row_of_b(window.start), width, window.rank, columns);
      }
      if (window.bias_row < 0) continue;
      float bias[COLUMNS];
      bank.read(row_of_b(window.bias_row), columns, bias);
      for (int64_t n = from; n < to; ++n) {
        const float factor = use.weights[n] * window.scale;
        float* row = tile[use.tokens[n] - first];
        for (int64_t j = 0; j < columns; ++j) row[j] = __builtin_fmaf(bias[j], factor, row[j]);
      }
    }
  }

  void fill(int64_t i, int64_t c, int64_t columns, int64_t first, int64_t last) const {
    float tile[TOKENS][COLUMNS];
    const Sibling& one = siblings[i];
    if (one.weight) {
      const char* rows = one.weight + c * one.weight_stride * base.size;
      base.products(x.data() + first, last - first, rows, one.weight_stride, k, columns, tile[0], COLUMNS);
      if (one.bias) {
        float bias[COLUMNS];
        base.read(one.bias + c * base.size, columns, bias);
        for (int64_t token = 0; token < last - first; ++token)
          for (int64_t j = 0; j < columns; ++j) tile[token][j] += bias[j];
      }
    } else {
      for (int64_t token = first; token < last; ++token)
        base.read(one.given + (token * one.width + c) * base.size, columns, tile[token - first]);
    }
    expand(i, c, columns, first, last, tile);
    for (int64_t token = first; token < last; ++token)
      base.write(tile[token - first], columns, one.out + (token * one.width + c) * base.size);
  }

  // Units [begin, end) of the columns of all siblings, side by side, for tokens [first, last).
  void fill_units(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    for (int64_t i = 0; i < static_cast<int64_t>(siblings.size()); ++i) {
      const int64_t width = siblings[i].width, units = (width + UNIT - 1) / UNIT;
      const int64_t to = std::min(end * UNIT, width);
      for (int64_t c = std::max(begin, int64_t(0)) * UNIT; c < to; c += COLUMNS)
        for (int64_t token = first; token < last; token += TOKENS)
          fill(i, c, std::min(COLUMNS, to - c), token, std::min(token + TOKENS, last));
      begin -= units;
      end -= units;
    }
  }

  void compute() {
    if (!uses.empty()) shrink();
    int64_t units = 0, work = 0;
    for (const Sibling& one : siblings) {
      units += (one.width + UNIT - 1) / UNIT;
      work += tokens * one.width * (one.weight ? k : 1);
    }
    for (const Use& use : uses) work += use.tokens.size() * use.lanes * UNIT * units;
    const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;
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

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

std::vector<Tensor> routed(std::vector<Tensor> ys, std::vector<Tensor> layers, std::vector<std::optional<Tensor>> biases, Tensor x,
                           std::vector<Tensor> a, std::vector<Tensor> b, std::vector<int64_t> caps, Tensor slots,
                           Tensor weights, Tensor count, Tensor scale, Tensor windows) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.is_contiguous(), "lorafx: x must be contiguous, with a batch dimension");
  const int64_t k = x.size(-1), rows = x.size(0), tokens = x.numel() / k;
  for (const auto& list : {ys, a, b})
    for (const Tensor& t : list) STD_TORCH_CHECK(t.is_contiguous(), "lorafx: ys, a and b must be contiguous");
  for (const Tensor& t : layers)
    STD_TORCH_CHECK(t.stride(1) == 1 && t.size(1) == k && t.scalar_type() == x.scalar_type(),
                    "lorafx: a layer's weight must be of x's dtype, [out, in], its rows contiguous");
  STD_TORCH_CHECK(layers.size() == biases.size(), "lorafx: expected a bias, or none, for each layer");
  for (const Tensor& t : a)
    STD_TORCH_CHECK(t.size(1) == k && t.scalar_type() == b[0].scalar_type(), "lorafx: a and b must be of one dtype");
  for (size_t i = 0; i < ys.size(); ++i)
    STD_TORCH_CHECK(ys[i].scalar_type() == x.scalar_type() && ys[i].size(-1) == b[i].size(1), "lorafx: ys must be as x and b say");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && scale.scalar_type() == ScalarType::Float,
                  "lorafx: weights and scale must be float32");

  Group group{kind(x), kind(b[0]), tokens, k,
              find_uses(rows, rows ? tokens / rows : 0, caps.size(), slots, weights, count, scale, windows)};
  std::vector<Tensor> outs;
  const bool ours = tokens <= FEW_TOKENS;
  int64_t row = 0;
  for (size_t i = 0; i < caps.size(); ++i) {
    const Tensor* bias = layers.empty() || !biases[i] ? nullptr : &*biases[i];
    if (!layers.empty() && !ours) {
      outs.push_back(linear(x, layers[i], bias));  // and what is added is added in place: nothing else reads it
    } else {
      std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
      sizes.back() = b[i].size(1);
      outs.push_back(torch::stable::new_empty(x, sizes));
    }
    Sibling one{b[i].size(1), static_cast<char*>(outs[i].mutable_data_ptr())};
    one.given = layers.empty() ? bytes(ys[i]) : one.out;
    if (!layers.empty() && ours) {
      one.weight = bytes(layers[i]);
      one.weight_stride = layers[i].stride(0);
      one.bias = bias ? bytes(*bias) : nullptr;
    }
    one.a = a.size() == 1 ? bytes(a[0]) + row * k * group.bank.size : bytes(a[i]);
    one.b = bytes(b[i]);
    row += caps[i];
    group.siblings.push_back(one);
  }
  if (tokens == 0 || (!layers.empty() && !ours && group.uses.empty())) return outs;
  std::vector<float> wide;
  const float* data = reinterpret_cast<const float*>(bytes(x));
  if (x.scalar_type() != ScalarType::Float) {
    wide.resize(tokens * k);
    group.base.read(bytes(x), tokens * k, wide.data());
    data = wide.data();
  }
  for (int64_t t = 0; t < tokens; ++t) group.x.push_back(data + t * k);
  group.compute();
  return outs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorafx, CPU, m) { m.impl("routed_cpp", TORCH_BOX(&routed)); }
