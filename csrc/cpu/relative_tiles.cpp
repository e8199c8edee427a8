#include "relative_tiles.h"

#include "vector_math_v4.h"

namespace fastcss::cpu {
namespace {

constexpr float kInf = __builtin_inff();

// ---- what differs between instruction sets -------------------------------------------------------------------------

struct OneTerm {  // a word is a float32
  static constexpr bool pairs = false;
  template <class V>
  static FASTCSS_INLINE V multiply_add(V sum, V x, V y) {
    return sum + x * y;
  }
  template <class V>
  static FASTCSS_INLINE V weight(V below) {  // e^below for below ≤ 0; NaN stays NaN
    return exp_negative(below);
  }
#if defined(__x86_64__)
  static FASTCSS_V4 inline Vec weight(Vec below) {
    const Vec t = at_least_least(below * kLog2e), whole = nearest(t);
    return times_power(exp2_fraction(t - whole), whole);
  }
#endif
};

#if defined(__x86_64__)
struct TwoTerms {  // a word is a pair of bfloat16
  static constexpr bool pairs = true;
  template <class V>
  static FASTCSS_V4_PAIRS inline Vec multiply_add(Vec sum, Vec x, Vec y) {
    return multiply_add_pairs(sum, x, y);
  }
  static FASTCSS_V4_PAIRS inline Vec weight(Vec below) {  // relative error 1e-4: it is rounded to bfloat16, by 2⁻⁹
    const Vec t = at_least_least(below * kLog2e), whole = nearest(t), r = t - whole;
    return times_power(((r * 0.05500892922282219f + 0.2422109693288803f) * r + 0.6932829022407532f) * r + 1.f, whole);
  }
};
#endif

// Calls f<ROWS>() for rows = 1 … MOST known at compile time.
template <int MOST, class F>
FASTCSS_INLINE void with_rows(int rows, const F& f) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, f);
  f.template operator()<MOST>();
}
template <class V>
constexpr int kTileRows = kLanesIn<V> == 16  ? 12
                          : kLanesIn<V> == 8 ? 6
                                             : 2;  // as kernel().rows

// ---- tiles of ROWS keys or channels by VECS vectors V of queries ---------------------------------------------------

template <class V, int ROWS, int VECS, class Word>
FASTCSS_INLINE void multiply(V (&sum)[ROWS][VECS], int64_t k, const float* a, const float* b) {
  accumulate<ROWS, V, ROWS, VECS, Word::template multiply_add<V>>(sum, k, a, b, kCols);
}

// Calls f(key, sums) for each key of a chunk: VECS vectors of its products with the columns.
template <class V, int VECS, class Word, class F>
FASTCSS_INLINE void for_products(const PackedKeys& keys, int64_t chunk, const float* columns, const F& f) {
  constexpr int kRows = kTileRows<V>;
  const int64_t first = chunk * kChunk, count = keys.in_chunk(chunk), words = keys.words(keys.D);
  for (int64_t j = 0; j < count; j += kRows)
    with_rows<kRows>(static_cast<int>(std::min<int64_t>(kRows, count - j)), [&]<int ROWS>() FASTCSS_LOOP {
      V sum[ROWS][VECS] = {};
      multiply<V, ROWS, VECS, Word>(sum, words, keys.panel(first + j), columns);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) f(j + i, sum[i]);
    });
}

// Knows the bias of one key after the other.
struct Bias {
  Bias(const PackedKeys& keys, int64_t chunk, const QueryPanel& p, int lane)
      : h(p.bias_h + chunk * kChunk / keys.columns * kCols + lane),
        w(p.bias_w + chunk * kChunk % keys.columns * kCols + lane),
        column(chunk * kChunk % keys.columns),
        columns(keys.columns) {}
  template <class V>
  FASTCSS_INLINE V at(int v) const {
    return load<V>(h + v * kLanesIn<V>) + load<V>(w + v * kLanesIn<V>);
  }
  FASTCSS_INLINE void next() {
    w += kCols;
    if (++column == columns) w -= columns * kCols, h += kCols, column = 0;
  }
  const float *h, *w;
  int64_t column, columns;
};

// scores [keys][kCols] → e^(score − most), or pairs of them; sum += those
template <class V, int VECS, class Word>
FASTCSS_INLINE void weigh(int64_t keys, float* scores, const V (&most)[VECS], V (&sum)[VECS]) {
  for (int64_t j = 0; j < keys; j += 1 + Word::pairs)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      const float* at = scores + j * kCols + v * kLanesIn<V>;
      V weight = Word::weight(load<V>(at) - most[v]);
      sum[v] += weight;
#if defined(__x86_64__)
      if constexpr (Word::pairs) {
        const V second = j + 1 < keys ? Word::weight(load<V>(at + kCols) - most[v]) : V{};
        sum[v] += second;
        weight = join_pairs(weight, second);
      }
#endif
      store(scores + j / (1 + Word::pairs) * kCols + v * kLanesIn<V>, weight);
    }
}

// out [D][kCols] += values · weights
template <class V, int VECS, class Word>
FASTCSS_INLINE void add_values_strip(const PackedKeys& keys, int64_t chunk, const float* weights, float* out) {
  constexpr int kRows = kTileRows<V>;
  const int64_t panels = value_panels(keys.D), words = keys.words(keys.in_chunk(chunk));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t channel = keys.D * p / panels, rows = keys.D * (p + 1) / panels - channel;
    with_rows<kRows>(static_cast<int>(rows), [&]<int ROWS>() FASTCSS_LOOP {
      V sum[ROWS][VECS] = {};
      multiply<V, ROWS, VECS, Word>(sum, words, keys.value_panel(chunk, channel), weights);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) {
          float* to = out + (channel + i) * kCols + v * kLanesIn<V>;
          store(to, load<V>(to) + sum[i][v]);
        }
    });
  }
}

template <class V, int VECS, class Word>
FASTCSS_INLINE void attend_strip(const PackedKeys& keys, int64_t chunk, const QueryPanel& p, int lane, float scale,
                                 float* scores) {
  constexpr int kWide = kLanesIn<V>;
  float* out = p.out + lane;
  V most[VECS], sum[VECS] = {}, finite[VECS];
  for (int v = 0; v < VECS; ++v) most[v] = load<V>(p.most + lane + v * kWide);
  Bias bias(keys, chunk, p, lane);
  for_products<V, VECS, Word>(keys, chunk, p.queries + lane, [&](int64_t j, const V(&sum)[VECS]) FASTCSS_LOOP {
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      const V score = sum[v] * scale + bias.at<V>(v);
      store(scores + j * kCols + lane + v * kWide, score);
      most[v] = larger(score, most[v]);
    }
    bias.next();
  });
  float now[VECS * kWide];
  for (int v = 0; v < VECS; ++v) store(now + v * kWide, most[v]);
  if (std::memcmp(now, p.most + lane, sizeof(now)) != 0) {
    V factor[VECS];
    for (int v = 0; v < VECS; ++v) {
      const V before = load<V>(p.most + lane + v * kWide), to = most[v] == -kInf ? V{} : most[v];
      factor[v] = Word::weight(before - to);
      store(p.sum + lane + v * kWide, load<V>(p.sum + lane + v * kWide) * factor[v]);
      store(p.most + lane + v * kWide, most[v]);
    }
    for (int64_t d = 0; d < keys.D; ++d)
      for (int v = 0; v < VECS; ++v)
        store(out + d * kCols + v * kWide, load<V>(out + d * kCols + v * kWide) * factor[v]);
  }
  for (int v = 0; v < VECS; ++v) finite[v] = most[v] == -kInf ? V{} : most[v];
  weigh<V, VECS, Word>(keys.in_chunk(chunk), scores + lane, finite, sum);
  for (int v = 0; v < VECS; ++v) {
    float* to = p.sum + lane + v * kWide;
    store(to, load<V>(to) + sum[v]);
  }
  add_values_strip<V, VECS, Word>(keys, chunk, scores + lane, out);
}

// Calls loop<V, VECS>(lane) for strips of a panel's lanes that fill this CPU's registers.
template <class F>
FASTCSS_INLINE void on_strips(int lanes, const F& loop) {
  on_widest([&]<class V>() FASTCSS_LOOP {
    if constexpr (kLanesIn<V> == kLanes) {
      lanes > kLanes ? loop.template operator()<V, 2>(0) : loop.template operator()<V, 1>(0);
    } else {
      for (int lane = 0; lane < lanes; lane += kLanes) loop.template operator()<V, kLanes / kLanesIn<V>>(lane);
    }
  });
}

}  // namespace

int64_t value_panels(int64_t D) { return (D + kernel().rows - 1) / kernel().rows; }

void attend(const PackedKeys& keys, int64_t chunk, const QueryPanel& p, float scale, float* scores) {
#if defined(__x86_64__)
  if (keys.pairs)
    return on_pairs([&]<class V>() FASTCSS_LOOP {
      if (p.lanes > kLanes) return attend_strip<V, 2, TwoTerms>(keys, chunk, p, 0, scale, scores);
      attend_strip<V, 1, TwoTerms>(keys, chunk, p, 0, scale, scores);
    });
#endif
  on_strips(p.lanes, [&]<class V, int VECS>(int lane)
                         FASTCSS_LOOP { attend_strip<V, VECS, OneTerm>(keys, chunk, p, lane, scale, scores); });
}

void weigh_again(const PackedKeys& keys, int64_t chunk, const QueryPanel& p, float scale, float* weights) {
  on_strips(kCols, [&]<class V, int VECS>(int lane) FASTCSS_LOOP {
    V total[VECS] = {};
    Bias bias(keys, chunk, p, lane);
    for_products<V, VECS, OneTerm>(keys, chunk, p.queries + lane, [&](int64_t j, const V(&sum)[VECS]) FASTCSS_LOOP {
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) {
        const int at = lane + v * kLanesIn<V>;
        const V weight = OneTerm::weight((sum[v] * scale + bias.at<V>(v)) - load<V>(p.most + at));
        store(weights + j * kCols + at, weight);
        total[v] += weight;
      }
      bias.next();
    });
    for (int v = 0; v < VECS; ++v) {
      float* to = p.sum + lane + v * kLanesIn<V>;
      store(to, load<V>(to) + total[v]);
    }
  });
}

void weight_gradients(const PackedKeys& values, int64_t chunk, const float* dout, const float* weights, float* dweights,
                      float* delta) {
  on_strips(kCols, [&]<class V, int VECS>(int lane) FASTCSS_LOOP {
    V total[VECS] = {};
    for_products<V, VECS, OneTerm>(values, chunk, dout + lane, [&](int64_t j, const V(&sum)[VECS]) FASTCSS_LOOP {
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) {
        const int64_t at = j * kCols + lane + v * kLanesIn<V>;
        store(dweights + at, sum[v]);
        total[v] += load<V>(weights + at) * sum[v];
      }
    });
    for (int v = 0; v < VECS; ++v) {
      float* to = delta + lane + v * kLanesIn<V>;
      store(to, load<V>(to) + total[v]);
    }
  });
}

void score_gradients(const PackedKeys& keys, int64_t chunk, const float* share, const float* delta,
                     const float* weights, float* dweights, float* dbias_h, float* dbias_w) {
  on_widest([&]<class V>() FASTCSS_LOOP {
    for (int lane = 0; lane < kCols; lane += kLanesIn<V>) {
      int64_t column = chunk * kChunk % keys.columns;
      float* of_row = dbias_h + chunk * kChunk / keys.columns * kCols + lane;
      V row = load<V>(of_row);
      for (int64_t j = 0; j < keys.in_chunk(chunk); ++j) {
        const int64_t at = j * kCols + lane;
        const V weight = load<V>(weights + at) * load<V>(share + lane);
        const V dscore = weight * (load<V>(dweights + at) - load<V>(delta + lane));
        float* of_column = dbias_w + column * kCols + lane;
        store(dweights + at, dscore);
        store(of_column, load<V>(of_column) + dscore);
        row += dscore;
        if (++column == keys.columns || j + 1 == keys.in_chunk(chunk)) {
          store(of_row, row);
          if (column == keys.columns && j + 1 < keys.in_chunk(chunk)) column = 0, row = load<V>(of_row += kCols);
        }
      }
    }
  });
}

void add_values(const PackedKeys& keys, int64_t chunk, const float* weights, float* out) {
  on_strips(kCols, [&]<class V, int VECS>(int lane)
                       FASTCSS_LOOP { add_values_strip<V, VECS, OneTerm>(keys, chunk, weights + lane, out + lane); });
}

}  // namespace fastcss::cpu
