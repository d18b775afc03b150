// One step of a Llama-shaped decoder in a single call: all scheduled tokens of all requests, from ids to logits.
//
// Each layer: norm, q k v, rotation and cache, attention, output; norm, gate and up, down. A phase is divided among the
// threads so that every number is computed by one thread alone; barriers stand between phases. Residual stream, norms
// and sums are float32, the cache and the attention's weights bfloat16, the products as in cpu_linear.h.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu_attention.h"
#include "cpu_linear.h"
#include "cpu_round.h"
#include "cpu_team.h"

struct Layer {
  const float *attention_norm, *q_norm, *k_norm, *mlp_norm;  // q_norm and k_norm may be null
  Matrix qkv, o, gate_up, down;  // q, k, v under each other; gate and up in alternate blocks
  int64_t window;                // positions seen; 0: all
  uint16_t* cache;
};

struct Model {
  int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, num_layers;
  float norm_eps, scale;
  const float *cos, *sin;  // (positions, head_dim / 2)
  const uint16_t* embed;   // (vocabulary, hidden_size) bfloat16
  const float* norm;
  const Layer* layers;
  Matrix head;
};

// What an adapter adds to one product: scale B (A x), for the blocks of outputs that it changes.
struct LowRank {
  int64_t rank;                 // rows of A, of all joined layers; 0: nothing
  const uint16_t* a;            // (rank, num_ins) bfloat16
  const float* scale;           // (rank)
  const uint16_t* b;            // of each block: (count, BLOCK) bfloat16
  const int32_t *first, *count; // of each block: which of the `rank` numbers it takes
  const int64_t* at;            // of each block: where it begins in b
};

struct Step {
  int64_t num_tokens, num_rows, num_threads;
  const int64_t *ids, *positions;
  const int64_t* starts;   // of each token: where its sequence's tiles begin in `tiles`
  const int32_t* tiles;
  const int64_t* order;    // of the tokens for attention: those that share tiles next to each other
  const int64_t* rows;     // the tokens after which logits are wanted
  float* logits;           // (num_rows, head.num_outs)
  const LowRank* const* adapters;  // of each token: qkv, o, gate_up, down of every layer, or null; null: none at all
};

enum Product { NONE = -1, QKV, O, GATE_UP, DOWN, NUM_PRODUCTS };

namespace {

template <class T>
struct Buffer {  // grows, never shrinks, 64-byte aligned
  T* data = nullptr;
  int64_t size = 0;
  T* get(int64_t wanted) {
    if (wanted > size) {
      std::free(data);
      data = static_cast<T*>(std::aligned_alloc(64, (wanted * sizeof(T) + 63) / 64 * 64));
      size = wanted;
    }
    return data;
  }
};

struct RowBuffers {
  Buffer<int8_t> q;
  Buffer<float> scale;
  Buffer<int32_t> offset;
  Buffer<uint16_t> halves;
  Rows get(int64_t rows, const Matrix& m) {
    const int64_t groups = rows * m.num_ins / GROUP;
    if (m.bits == 16) return {nullptr, nullptr, nullptr, halves.get(rows * m.num_ins)};
    return {q.get(rows * m.num_ins), scale.get(groups), offset.get(groups), nullptr};
  }
};

struct Workspace {
  Buffer<float> stream, qkv, attended, wide, low, tail, tail_attended;
  Buffer<uint16_t> queries;
  std::vector<RowBuffers> normed, mixed;  // one for each thread, see `FEW`
  RowBuffers gated;
  Buffer<Counter> counters;
};

// With fewer tokens than this every thread prepares the activations of a product for itself: that takes a microsecond,
// and saves a meeting. Keys and values are then placed by the thread that looks at them.
constexpr int64_t FEW = 4;

constexpr int64_t AHEAD_BYTES = 2048;  // an adapter's A is fetched so far ahead

enum Phase { AT_START, AT_NORM, AT_QKV, AT_PLACE, AT_ATTEND, AT_MIX, AT_OUT, AT_MLP_NORM, AT_GATE, AT_DOWN, AT_HEAD, NUM_PHASES };

#ifdef MW_TIMES  // benchmarks/cpu_step.py: ticks of work and of waiting, of each thread in each phase
uint64_t phase_times[64][NUM_PHASES][2], last_time[64];
#endif

int64_t share(int64_t count, int thread, int num_threads) { return count * thread / num_threads; }

// Norm a head and turn it by its position, half-split: to bfloat16, times `factor`.
void turn_head(const float* x, const float* norm, float eps, const float* cos, const float* sin, int64_t size, float factor,
               uint16_t* out) {
  const float inverse = norm ? inverse_rms(x, size, eps) : 1.f;
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const __mmask16 in = half - i < LANES ? (1 << (half - i)) - 1 : 0xFFFF;
    const auto load = [&](const float* from) { return _mm512_maskz_loadu_ps(in, from); };
    __m512 a = load(x + i), b = load(x + half + i);
    if (norm) {
      a = _mm512_mul_ps(_mm512_mul_ps(a, _mm512_set1_ps(inverse)), load(norm + i));
      b = _mm512_mul_ps(_mm512_mul_ps(b, _mm512_set1_ps(inverse)), load(norm + half + i));
    }
    const __m512 c = load(cos + i), s = load(sin + i), f = _mm512_set1_ps(factor);
    const __m512 first = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), second = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
    _mm256_mask_storeu_epi16(out + i, in, narrow(_mm512_mul_ps(first, f)));
    _mm256_mask_storeu_epi16(out + half + i, in, narrow(_mm512_mul_ps(second, f)));
  }
}

class Run {
 public:
  Run(const Model& model, const Step& step, Workspace& space)
      : m(model), s(step), w(space), is_small(step.num_tokens < FEW && !step.adapters), has_few_rows(step.num_rows < FEW),
        is_cut(!is_small && !step.adapters && 2 * step.num_rows <= step.num_tokens) {
    const int64_t T = s.num_tokens, all_heads = m.num_heads + 2 * m.num_kv_heads;
    x = w.stream.get(T * m.hidden_size);
    qkv = w.qkv.get(T * all_heads * m.head_dim);
    attended = w.attended.get(T * m.num_heads * m.head_dim);
    queries = w.queries.get(T * m.num_heads * m.head_dim);
    if (int64_t(w.normed.size()) < s.num_threads) w.normed.resize(s.num_threads), w.mixed.resize(s.num_threads);
    for (int64_t i = 0; i < s.num_threads; ++i) {  // room for all, before the threads look
      const int64_t rows = i == 0 ? std::max(T, s.num_rows) : FEW;
      for (int64_t l = 0; l < m.num_layers; ++l) {
        const Layer& layer = m.layers[l];
        w.normed[i].get(rows, layer.qkv);
        w.normed[i].get(rows, layer.gate_up);
        w.mixed[i].get(rows, layer.o);
        if (i == 0) w.gated.get(T, layer.down);
      }
      w.normed[i].get(rows, m.head);
    }
    if (is_cut) {
      tail = w.tail.get(s.num_rows * m.hidden_size);
      tail_attended = w.tail_attended.get(s.num_rows * m.num_heads * m.head_dim);
    }
    counters = w.counters.get((m.num_layers + 1) * NUM_PHASES);
    for (int64_t i = 0; i < (m.num_layers + 1) * NUM_PHASES; ++i) counters[i].next.store(0, std::memory_order_relaxed);
    if (s.adapters) find_segments();
  }

  void work(int thread) {
    const int n = team().size();
    const int64_t T = s.num_tokens, begin = share(T, thread, n), end = share(T, thread + 1, n), D = m.hidden_size;
#ifdef MW_TIMES
    last_time[thread] = __rdtsc();
#endif
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < D; i += LANES)
        _mm512_storeu_ps(x + t * D + i, widen(_mm256_loadu_si256((const __m256i*)(m.embed + s.ids[t] * D + i))));
    if (is_small) meet(thread, AT_START);
    for (int64_t l = 0; l < m.num_layers; ++l) {
      attention(l, thread, n, is_small ? 0 : begin, is_small ? T : end);
      if (is_cut && l == m.num_layers - 1) {
        const int64_t first = share(s.num_rows, thread, n), past = share(s.num_rows, thread + 1, n);
        keep_tail(first, past);
        rest(l, thread, n, {tail, tail_attended, s.num_rows, first, past});
      } else {
        rest(l, thread, n, {x, attended, T, is_small ? 0 : begin, is_small ? T : end});
      }
    }
    logits(thread, n);
  }

 private:
  const Model& m;
  const Step& s;
  Workspace& w;
  const bool is_small, has_few_rows;
  const bool is_cut;  // behind the last attention, only rows that logits are wanted of are computed
  Counter* counters;  // of each layer and phase
  float *x, *qkv, *attended;
  float *tail = nullptr, *tail_attended = nullptr;  // of these rows: the stream, what attention saw
  uint16_t* queries;
  struct Segment { int64_t first, count; const LowRank* of; };  // tokens next to each other, of one adapter
  std::vector<Segment> segments;
  int64_t max_rank = 0, widest = 0;
  float *wide = nullptr, *low = nullptr;  // what the products of such tokens take in; A x

  void find_segments() {
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      const LowRank* of = s.adapters[t];
      if (!of) continue;
      if (!segments.empty() && segments.back().of == of && segments.back().first + segments.back().count == t) {
        ++segments.back().count;
        continue;
      }
      segments.push_back({t, 1, of});
      for (int64_t i = 0; i < m.num_layers * NUM_PRODUCTS; ++i) max_rank = std::max(max_rank, of[i].rank);
    }
    for (int64_t l = 0; l < m.num_layers; ++l) widest = std::max({widest, m.hidden_size, m.layers[l].down.num_ins});
    wide = w.wide.get(s.num_tokens * widest);
    low = w.low.get(s.num_tokens * max_rank);
  }

  bool is_adapted(int64_t t) const { return s.adapters && s.adapters[t]; }

  // Keep a token's normed row as it is before rounding, for its adapter.
  void keep_wide(int64_t t, float inverse, const float* norm) {
    if (!is_adapted(t)) return;
    for (int64_t i = 0; i < m.hidden_size; i += LANES) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + t * m.hidden_size + i), _mm512_set1_ps(inverse));
      _mm512_storeu_ps(wide + t * widest + i, _mm512_mul_ps(scaled, _mm512_loadu_ps(norm + i)));
    }
  }

  // A x of all tokens with an adapter: each number by one thread, in one order, whatever stands beside it.
  void shrink(int64_t which, const float* in, int64_t stride, int64_t num_ins, int thread, int n) {
    int64_t total = 0;
    for (const Segment& segment : segments) total += segment.of[which].rank;
    const int64_t begin = share(total, thread, n), end = share(total, thread + 1, n);
    int64_t passed = 0;
    for (const Segment& segment : segments) {
      const LowRank& change = segment.of[which];
      for (int64_t k = std::max<int64_t>(0, begin - passed); k < change.rank && passed + k < end; ++k)
        for (int64_t t = segment.first; t < segment.first + segment.count; ++t) {
          const uint16_t* a = change.a + k * num_ins;
          const float* row = in + t * stride;
          __m512 even = _mm512_setzero_ps(), odd = even;
          for (int64_t i = 0; i < num_ins; i += 2 * LANES) {
            _mm_prefetch((const char*)(a + i) + AHEAD_BYTES, _MM_HINT_T0);  // what is used next lies behind it
            even = _mm512_fmadd_ps(widen(_mm256_loadu_si256((const __m256i*)(a + i))), _mm512_loadu_ps(row + i), even);
            odd = _mm512_fmadd_ps(widen(_mm256_loadu_si256((const __m256i*)(a + i + LANES))), _mm512_loadu_ps(row + i + LANES), odd);
          }
          low[t * max_rank + k] = change.scale[k] * _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
        }
      passed += change.rank;
    }
  }

  // Fetch what `expand` will read, while the product is computed.
  void expect(int64_t which, int64_t block, RowTile tile) const {
    if (!s.adapters || which < 0) return;
    for (int r = 0; r < tile.count; ++r) {
      const LowRank* of = s.adapters[tile.first + r];
      if (!of || !of[which].rank || (r > 0 && of == s.adapters[tile.first + r - 1])) continue;
      const uint16_t* b = of[which].b + of[which].at[block];
      for (int32_t k = 0; k < of[which].count[block]; ++k) _mm_prefetch((const char*)(b + k * BLOCK), _MM_HINT_T0);
    }
  }

  // Add B (A x) to a block of outputs y (tile.count, BLOCK).
  void expand(int64_t which, int64_t block, RowTile tile, float* y) const {
    if (!s.adapters || which < 0) return;
    for (int r = 0; r < tile.count; ++r) {
      const LowRank* of = s.adapters[tile.first + r];
      if (!of || !of[which].rank) continue;
      const LowRank& change = of[which];
      const uint16_t* b = change.b + change.at[block];
      const float* from = low + (tile.first + r) * max_rank + change.first[block];
      __m512 left = _mm512_loadu_ps(y + r * BLOCK), right = _mm512_loadu_ps(y + r * BLOCK + LANES);
      for (int32_t k = 0; k < change.count[block]; ++k, b += BLOCK) {
        const __m512 factor = _mm512_set1_ps(from[k]);
        left = _mm512_fmadd_ps(factor, widen(_mm256_loadu_si256((const __m256i*)b)), left);
        right = _mm512_fmadd_ps(factor, widen(_mm256_loadu_si256((const __m256i*)(b + LANES))), right);
      }
      _mm512_storeu_ps(y + r * BLOCK, left);
      _mm512_storeu_ps(y + r * BLOCK + LANES, right);
    }
  }

  int64_t tile_of(int64_t t) const { return s.tiles[s.starts[t] + s.positions[t] / TILE]; }

  // Wait for the others at the end of a phase.
  void meet(int thread, Phase phase) {
#ifdef MW_TIMES
    const uint64_t before = __rdtsc();
    team().barrier();
    const uint64_t after = __rdtsc();
    phase_times[thread][phase][0] += before - last_time[thread];
    phase_times[thread][phase][1] += after - before;
    last_time[thread] = after;
#else
    team().barrier();
#endif
  }

  // Tokens [begin, end) are this thread's where a phase goes token by token: all of them when they are few.
  void attention(int64_t l, int thread, int n, int64_t begin, int64_t end) {
    const Layer& layer = m.layers[l];
    Counter* next = counters + l * NUM_PHASES;
    const int64_t T = s.num_tokens, D = m.hidden_size, H = m.head_dim, which = l * NUM_PRODUCTS;
    const Cache cache{layer.cache, m.num_kv_heads, H};
    const Rows normed = w.normed[is_small ? thread : 0].get(0, layer.qkv);
    for (int64_t t = begin; t < end; ++t) {
      const float inverse = inverse_rms(x + t * D, D, m.norm_eps);
      quantize_row(x + t * D, inverse, layer.attention_norm, D, layer.qkv.bits, normed, t);
      keep_wide(t, inverse, layer.attention_norm);
      if (!is_small && s.positions[t] % TILE == 0)
        for (int64_t h = 0; h < m.num_kv_heads; ++h) cache.clear_values(tile_of(t), h);
    }
    if (!is_small) meet(thread, AT_NORM);
    if (s.adapters) {
      shrink(which + QKV, wide, widest, D, thread, n);
      team().barrier();
    }
    product(layer.qkv, normed, T, next[AT_QKV], n, qkv, which + QKV);
    meet(thread, AT_QKV);
    if (is_small) {
      for (int64_t h = share(m.num_kv_heads, thread, n); h < share(m.num_kv_heads, thread + 1, n); ++h) {
        for (int64_t t = 0; t < T; ++t) {
          if (s.positions[t] % TILE == 0) cache.clear_values(tile_of(t), h);
          place(layer, cache, t, h);
        }
        attend_part(layer, cache, h, 0, T);
      }
    } else {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t h = 0; h < m.num_kv_heads; ++h) place(layer, cache, t, h);
      meet(thread, AT_PLACE);
      attend_all(layer, cache, next[AT_ATTEND]);
    }
    meet(thread, AT_ATTEND);
  }

  struct Part {  // of the tokens: what a layer computes behind its attention
    float *x, *attended;
    int64_t count, begin, end;  // [begin, end) are this thread's
  };

  void keep_tail(int64_t begin, int64_t end) {
    const int64_t D = m.hidden_size, A = m.num_heads * m.head_dim;
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(tail + r * D, x + s.rows[r] * D, sizeof(float) * D);
      std::memcpy(tail_attended + r * A, attended + s.rows[r] * A, sizeof(float) * A);
    }
  }

  void rest(int64_t l, int thread, int n, const Part& part) {
    const Layer& layer = m.layers[l];
    Counter* next = counters + l * NUM_PHASES;
    const int64_t D = m.hidden_size, A = m.num_heads * m.head_dim, which = l * NUM_PRODUCTS;
    const int owner = is_small ? thread : 0;
    const Rows mixed = w.mixed[owner].get(0, layer.o);
    for (int64_t t = part.begin; t < part.end; ++t)
      quantize_row(part.attended + t * A, 1.f, nullptr, A, layer.o.bits, mixed, t);
    if (s.adapters) shrink(which + O, attended, A, A, thread, n);
    if (!is_small) meet(thread, AT_MIX);
    add_product(layer.o, mixed, next[AT_OUT], n, part, which + O);
    meet(thread, AT_OUT);
    const Rows again = w.normed[owner].get(0, layer.gate_up), gated = w.gated.get(0, layer.down);
    for (int64_t t = part.begin; t < part.end; ++t) {
      const float* row = part.x + t * D;
      const float inverse = inverse_rms(row, D, m.norm_eps);
      quantize_row(row, inverse, layer.mlp_norm, D, layer.gate_up.bits, again, t);
      keep_wide(t, inverse, layer.mlp_norm);
    }
    if (!is_small) meet(thread, AT_MLP_NORM);
    if (s.adapters) {
      shrink(which + GATE_UP, wide, widest, D, thread, n);
      team().barrier();
    }
    gate(layer, again, gated, next[AT_GATE], n, part.count, which + GATE_UP);
    meet(thread, AT_GATE);
    if (s.adapters) {
      shrink(which + DOWN, wide, widest, layer.down.num_ins, thread, n);
      team().barrier();
    }
    add_product(layer.down, gated, next[AT_DOWN], n, part, which + DOWN);
    meet(thread, AT_DOWN);
  }

  // Visit all blocks with all rows, together with the other threads.
  template <class Visit>
  void each_block(const Matrix& matrix, int per_visit, int64_t num_rows, Counter& next, int n, Visit visit) {
    int64_t begin, end;
    const int64_t num_bytes = per_visit * block_bytes(matrix.bits, matrix.num_ins);
    while (next.take(matrix.num_outs / BLOCK / per_visit, n, &begin, &end)) each_tile(begin, end, num_rows, num_bytes, visit);
  }

  void product(const Matrix& matrix, const Rows& rows, int64_t num_rows, Counter& next, int n, float* out, int64_t which = NONE) {
    each_block(matrix, 1, num_rows, next, n, [&](int64_t block, RowTile tile) {
      float y[MAX_ROWS * BLOCK];
      expect(which, block, tile);
      multiply_block(matrix, block, rows, tile, y);
      expand(which, block, tile, y);
      for (int r = 0; r < tile.count; ++r) std::memcpy(out + (tile.first + r) * matrix.num_outs + block * BLOCK, y + r * BLOCK, sizeof(float) * BLOCK);
    });
  }

  void add_product(const Matrix& matrix, const Rows& rows, Counter& next, int n, const Part& part, int64_t which) {
    const int64_t D = m.hidden_size;
    each_block(matrix, 1, part.count, next, n, [&](int64_t block, RowTile tile) {
      float y[MAX_ROWS * BLOCK];
      expect(which, block, tile);
      multiply_block(matrix, block, rows, tile, y);
      expand(which, block, tile, y);
      for (int r = 0; r < tile.count; ++r)
        for (int i = 0; i < BLOCK; ++i) part.x[(tile.first + r) * D + block * BLOCK + i] += y[r * BLOCK + i];
    });
  }

  // A block of the hidden layer is a group of the next product: it is quantized where it is made.
  void gate(const Layer& layer, const Rows& rows, const Rows& out, Counter& next, int n, int64_t num_rows, int64_t which) {
    const int64_t F = layer.down.num_ins;
    each_block(layer.gate_up, 2, num_rows, next, n, [&](int64_t block, RowTile tile) {
      if (tile.ahead > 0) tile.ahead *= 2;
      float g[MAX_ROWS * BLOCK], u[MAX_ROWS * BLOCK];
      expect(which, block * 2, tile);
      expect(which, block * 2 + 1, tile);
      multiply_block(layer.gate_up, block * 2, rows, tile, g);
      multiply_block(layer.gate_up, block * 2 + 1, rows, tile, u);
      expand(which, block * 2, tile, g);
      expand(which, block * 2 + 1, tile, u);
      for (int r = 0; r < tile.count; ++r) {
        float* y = g + r * BLOCK;
        for (int i = 0; i < BLOCK; i += LANES)
          _mm512_storeu_ps(y + i, _mm512_mul_ps(silu(_mm512_loadu_ps(y + i)), _mm512_loadu_ps(u + r * BLOCK + i)));
        const int64_t row = tile.first + r, at = row * (F / GROUP) + block;
        if (is_adapted(row)) std::memcpy(wide + row * widest + block * BLOCK, y, sizeof(float) * BLOCK);
        if (layer.down.bits == 16) {
          for (int i = 0; i < BLOCK; i += LANES)
            _mm256_storeu_si256((__m256i*)(out.halves + row * F + block * BLOCK + i), narrow(_mm512_loadu_ps(y + i)));
        } else {
          quantize_group(_mm512_loadu_ps(y), _mm512_loadu_ps(y + LANES), layer.down.bits, out.q + row * F + block * BLOCK,
                         out.scale + at, out.offset + at);
        }
      }
    });
  }

  // Turn the queries, keys and values of one token and key head, and store the last two.
  void place(const Layer& layer, const Cache& cache, int64_t t, int64_t h) {
    const int64_t H = m.head_dim, N = m.num_heads, K = m.num_kv_heads, G = N / K, position = s.positions[t];
    const float *row = qkv + t * (N + 2 * K) * H, *cos = m.cos + position * (H / 2), *sin = m.sin + position * (H / 2);
    uint16_t k[512], v[512];
    for (int64_t i = h * G; i < (h + 1) * G; ++i)
      turn_head(row + i * H, layer.q_norm, m.norm_eps, cos, sin, H, m.scale * LOG2_E, queries + (t * N + i) * H);
    turn_head(row + (N + h) * H, layer.k_norm, m.norm_eps, cos, sin, H, 1.f, k);
    for (int64_t d = 0; d < H; d += LANES)
      _mm256_storeu_si256((__m256i*)(v + d), narrow(_mm512_loadu_ps(row + (N + K + h) * H + d)));
    cache.store(tile_of(t), h, position % TILE, k, v);
  }

  void attend_all(const Layer& layer, const Cache& cache, Counter& next) {
    const int64_t K = m.num_kv_heads, G = m.num_heads / K;
    const int64_t tokens = 64 / G > 0 ? 64 / G : 1, num_items = (s.num_tokens + tokens - 1) / tokens * K;
    for (int64_t item; (item = next.next.fetch_add(1)) < num_items;) {
      const int64_t begin = item / K * tokens;
      attend_part(layer, cache, item % K, begin, std::min(begin + tokens, s.num_tokens));
    }
  }

  // Attend for one key head and the tokens [begin, end) of the order.
  void attend_part(const Layer& layer, const Cache& cache, int64_t head, int64_t begin, int64_t end) {
    thread_local std::vector<Row> rows;
    const int64_t H = m.head_dim, N = m.num_heads, G = N / m.num_kv_heads;
    rows.clear();
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = s.order[at], position = s.positions[t];
      const int64_t lowest = layer.window && position >= layer.window ? position - layer.window + 1 : 0;
      for (int64_t g = 0; g < G; ++g) {
        const int64_t place = (t * N + head * G + g) * H;
        rows.push_back({queries + place, s.tiles + s.starts[t], position, lowest, 0.f, 0.f, attended + place});
      }
    }
    attend(rows.data(), int(rows.size()), cache, head);
  }

  void logits(int thread, int n) {
    const int64_t D = m.hidden_size;
    const Rows rows = w.normed[has_few_rows ? thread : 0].get(0, m.head);
    const int64_t begin = has_few_rows ? 0 : share(s.num_rows, thread, n);
    const int64_t end = has_few_rows ? s.num_rows : share(s.num_rows, thread + 1, n);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = is_cut ? tail + r * D : x + s.rows[r] * D;
      quantize_row(row, inverse_rms(row, D, m.norm_eps), m.norm, D, m.head.bits, rows, r);
    }
    if (!has_few_rows) meet(thread, AT_NORM);
    product(m.head, rows, s.num_rows, counters[m.num_layers * NUM_PHASES], n, s.logits);
#ifdef MW_TIMES
    meet(thread, AT_HEAD);
#endif
  }
};

}  // namespace

extern "C" {

int64_t mw_block_bytes(int64_t bits, int64_t num_ins) { return block_bytes(bits, num_ins); }

// Lay out rows of whole numbers (num_outs, num_ins), unsigned, with scales (num_outs, num_scales) bfloat16, as blocks
// `stride` blocks apart. The rows are as modelwright.nn.lowbit packs them; outputs that a last block lacks are zeros.
void mw_pack(const uint8_t* q, const uint16_t* scale, int64_t bits, int64_t num_outs, int64_t num_ins, int64_t num_scales,
             int64_t row_bytes, int64_t stride, uint8_t* blocks, int64_t num_threads) {
  const int64_t num_blocks = (num_outs + BLOCK - 1) / BLOCK, size = block_bytes(bits, num_ins), groups = num_ins / GROUP;
  const int64_t num_words = GROUP * bits / 32;  // of a row's group
  const auto word = [&](int64_t o, int64_t at) -> uint32_t {
    if (o >= num_outs) return bits == 4 ? 0x88888888u : 0x80808080u;
    uint32_t w;
    std::memcpy(&w, q + o * row_bytes + at * 4, 4);
    // 8 numbers of 4 bits: the first four to the low halves of the bytes, the others to the high ones
    return bits == 8 ? w : _pdep_u32(w & 0xFFFF, 0x0F0F0F0Fu) | _pdep_u32(w >> 16, 0xF0F0F0F0u);
  };
  team().run(int(num_threads), [&](int thread) {
    for (int64_t b = share(num_blocks, thread, int(num_threads)); b < share(num_blocks, thread + 1, int(num_threads)); ++b)
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* to = blocks + b * stride * size + g * group_bytes(bits);
        for (int64_t i = 0; i < num_words; ++i)
          for (int64_t o = b * BLOCK; o < (b + 1) * BLOCK; ++o, to += 4) {
            const uint32_t w = word(o, g * num_words + i);
            std::memcpy(to, &w, 4);
          }
        for (int64_t o = b * BLOCK; o < (b + 1) * BLOCK; ++o, to += 2) {
          const uint16_t value = o < num_outs ? scale[o * num_scales + g * num_scales / groups] : 0;
          std::memcpy(to, &value, 2);
        }
      }
  });
}

// The same for bfloat16 weights (num_outs, num_ins).
void mw_pack_halves(const uint16_t* weight, int64_t num_outs, int64_t num_ins, int64_t stride, uint8_t* blocks, int64_t num_threads) {
  const int64_t num_blocks = (num_outs + BLOCK - 1) / BLOCK, size = block_bytes(16, num_ins);
  team().run(int(num_threads), [&](int thread) {
    for (int64_t b = share(num_blocks, thread, int(num_threads)); b < share(num_blocks, thread + 1, int(num_threads)); ++b) {
      uint8_t* to = blocks + b * stride * size;
      for (int64_t i = 0; i < num_ins; i += 2)
        for (int64_t o = b * BLOCK; o < (b + 1) * BLOCK; ++o, to += 4) {
          uint32_t two = 0;
          if (o < num_outs) std::memcpy(&two, weight + o * num_ins + i, 4);
          std::memcpy(to, &two, 4);
        }
    }
  });
}

// Round bfloat16 weights (num_outs, num_ins) to `bits`: q as modelwright.nn.lowbit packs it, scales (num_outs, groups).
void mw_round(const uint16_t* weight, int64_t bits, int64_t num_outs, int64_t num_ins, int64_t group_size, int64_t row_bytes,
              uint8_t* q, uint16_t* scale, int64_t num_threads) {
  const int64_t groups = num_ins / group_size;
  const int surplus = bits == 4 ? 8 : 128;
  team().run(int(num_threads), [&](int thread) {
    std::vector<float> row(num_ins);
    std::vector<int8_t> whole(num_ins);
    for (int64_t o = share(num_outs, thread, int(num_threads)); o < share(num_outs, thread + 1, int(num_threads)); ++o) {
      for (int64_t i = 0; i < num_ins; i += LANES)
        _mm512_storeu_ps(&row[i], widen(_mm256_loadu_si256((const __m256i*)(weight + o * num_ins + i))));
      for (int64_t g = 0; g < groups; ++g) {
        const float found = round_group(&row[g * group_size], group_size, int(bits), &whole[g * group_size]);
        uint32_t word;
        std::memcpy(&word, &found, 4);  // exactly a bfloat16
        scale[o * groups + g] = uint16_t(word >> 16);
      }
      uint8_t* to = q + o * row_bytes;
      for (int64_t i = 0; i < num_ins; i += bits == 4 ? 2 : 1)
        *to++ = uint8_t(whole[i] + surplus) | (bits == 4 ? uint8_t((whole[i + 1] + surplus) << 4) : 0);
    }
  });
}

// y (rows, num_outs) = x (rows, num_ins) times a packed matrix.
void mw_linear(const Matrix* matrix, const float* x, int64_t num_rows, float* y, int64_t num_threads) {
  static Workspace space;
  if (space.normed.empty()) space.normed.resize(1);
  const Rows rows = space.normed[0].get(num_rows, *matrix);
  team().run(int(num_threads), [&](int thread) {
    const int n = int(num_threads);
    for (int64_t r = share(num_rows, thread, n); r < share(num_rows, thread + 1, n); ++r)
      quantize_row(x + r * matrix->num_ins, 1.f, nullptr, matrix->num_ins, matrix->bits, rows, r);
    team().barrier();
    const int64_t blocks = matrix->num_outs / BLOCK;
    each_tile(share(blocks, thread, n), share(blocks, thread + 1, n), num_rows, block_bytes(matrix->bits, matrix->num_ins), [&](int64_t block, RowTile tile) {
      float out[MAX_ROWS * BLOCK];
      multiply_block(*matrix, block, rows, tile, out);
      for (int r = 0; r < tile.count; ++r) std::memcpy(y + (tile.first + r) * matrix->num_outs + block * BLOCK, out + r * BLOCK, sizeof(float) * BLOCK);
    });
  });
}

void mw_step(const Model* model, const Step* step) {
  static Workspace space;  // steps of one process take turns
  Run run(*model, *step, space);
  team().run(int(step->num_threads), [&](int thread) { run.work(thread); });
}

#ifdef MW_TIMES
// Copy and clear what each phase took: (threads, phases, 2) ticks. Return the number of phases.
int64_t mw_take_times(uint64_t* out, int64_t num_threads) {
  std::memcpy(out, phase_times, num_threads * sizeof(phase_times[0]));
  std::memset(phase_times, 0, sizeof(phase_times));
  return NUM_PHASES;
}
#endif

}  // extern "C"
