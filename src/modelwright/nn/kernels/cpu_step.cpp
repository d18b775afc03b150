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

struct Step {
  int64_t num_tokens, num_rows, num_threads;
  const int64_t *ids, *positions;
  const int64_t* starts;   // of each token: where its sequence's tiles begin in `tiles`
  const int32_t* tiles;
  const int64_t* order;    // of the tokens for attention: those that share tiles next to each other
  const int64_t* rows;     // the tokens after which logits are wanted
  float* logits;           // (num_rows, head.num_outs)
};

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
  Buffer<float> stream, qkv, attended;
  Buffer<uint16_t> queries;
  RowBuffers normed, mixed, gated;
};

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
  Run(const Model& model, const Step& step, Workspace& space) : m(model), s(step), w(space) {
    const int64_t T = s.num_tokens, all_heads = m.num_heads + 2 * m.num_kv_heads;
    x = w.stream.get(T * m.hidden_size);
    qkv = w.qkv.get(T * all_heads * m.head_dim);
    attended = w.attended.get(T * m.num_heads * m.head_dim);
    queries = w.queries.get(T * m.num_heads * m.head_dim);
    for (int64_t l = 0; l < m.num_layers; ++l) {  // room for all, before the threads look
      const Layer& layer = m.layers[l];
      w.normed.get(T, layer.qkv);
      w.normed.get(T, layer.gate_up);
      w.mixed.get(T, layer.o);
      w.gated.get(T, layer.down);
    }
    w.normed.get(s.num_rows, m.head);
  }

  void work(int thread) {
    const int n = team().size();
    const int64_t T = s.num_tokens, begin = share(T, thread, n), end = share(T, thread + 1, n), D = m.hidden_size;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < D; i += LANES)
        _mm512_storeu_ps(x + t * D + i, widen(_mm256_loadu_si256((const __m256i*)(m.embed + s.ids[t] * D + i))));
    for (int64_t l = 0; l < m.num_layers; ++l) layer(m.layers[l], thread, n, begin, end);
    logits(thread, n);
  }

 private:
  const Model& m;
  const Step& s;
  Workspace& w;
  float *x, *qkv, *attended;
  uint16_t* queries;

  int64_t tile_of(int64_t t) const { return s.tiles[s.starts[t] + s.positions[t] / TILE]; }

  void layer(const Layer& layer, int thread, int n, int64_t begin, int64_t end) {
    const int64_t T = s.num_tokens, D = m.hidden_size, H = m.head_dim;
    const Cache cache{layer.cache, m.num_kv_heads, H};
    const Rows normed = w.normed.get(T, layer.qkv), mixed = w.mixed.get(T, layer.o);
    for (int64_t t = begin; t < end; ++t) {
      quantize_row(x + t * D, inverse_rms(x + t * D, D, m.norm_eps), layer.attention_norm, D, layer.qkv.bits, normed, t);
      if (s.positions[t] % TILE == 0) cache.clear_values(tile_of(t));
    }
    team().barrier();
    product(layer.qkv, normed, T, thread, n, qkv);
    team().barrier();
    if (thread == 0) team().next = 0;
    for (int64_t t = begin; t < end; ++t) place(layer, cache, t);
    team().barrier();
    attend_all(layer, cache);
    team().barrier();
    for (int64_t t = begin; t < end; ++t)
      quantize_row(attended + t * m.num_heads * H, 1.f, nullptr, m.num_heads * H, layer.o.bits, mixed, t);
    team().barrier();
    add_product(layer.o, mixed, thread, n);
    team().barrier();
    const Rows again = w.normed.get(T, layer.gate_up), gated = w.gated.get(T, layer.down);
    for (int64_t t = begin; t < end; ++t)
      quantize_row(x + t * D, inverse_rms(x + t * D, D, m.norm_eps), layer.mlp_norm, D, layer.gate_up.bits, again, t);
    team().barrier();
    gate(layer, again, gated, thread, n);
    team().barrier();
    add_product(layer.down, gated, thread, n);
    team().barrier();
  }

  void product(const Matrix& matrix, const Rows& rows, int64_t num_rows, int thread, int n, float* out) {
    const int64_t blocks = matrix.num_outs / BLOCK;
    each_tile(share(blocks, thread, n), share(blocks, thread + 1, n), num_rows, [&](int64_t block, RowTile tile) {
      float y[MAX_ROWS * BLOCK];
      multiply_block(matrix, block, rows, tile, y);
      for (int r = 0; r < tile.count; ++r) std::memcpy(out + (tile.first + r) * matrix.num_outs + block * BLOCK, y + r * BLOCK, sizeof(float) * BLOCK);
    });
  }

  void add_product(const Matrix& matrix, const Rows& rows, int thread, int n) {
    const int64_t blocks = matrix.num_outs / BLOCK, D = m.hidden_size;
    each_tile(share(blocks, thread, n), share(blocks, thread + 1, n), s.num_tokens, [&](int64_t block, RowTile tile) {
      float y[MAX_ROWS * BLOCK];
      multiply_block(matrix, block, rows, tile, y);
      for (int r = 0; r < tile.count; ++r)
        for (int i = 0; i < BLOCK; ++i) x[(tile.first + r) * D + block * BLOCK + i] += y[r * BLOCK + i];
    });
  }

  // A block of the hidden layer is a group of the next product: it is quantized where it is made.
  void gate(const Layer& layer, const Rows& rows, const Rows& out, int thread, int n) {
    const int64_t blocks = layer.down.num_ins / BLOCK, F = layer.down.num_ins;
    each_tile(share(blocks, thread, n), share(blocks, thread + 1, n), s.num_tokens, [&](int64_t block, RowTile tile) {
      float g[MAX_ROWS * BLOCK], u[MAX_ROWS * BLOCK];
      multiply_block(layer.gate_up, block * 2, rows, tile, g);
      multiply_block(layer.gate_up, block * 2 + 1, rows, tile, u);
      for (int r = 0; r < tile.count; ++r) {
        float* y = g + r * BLOCK;
        for (int i = 0; i < BLOCK; i += LANES)
          _mm512_storeu_ps(y + i, _mm512_mul_ps(silu(_mm512_loadu_ps(y + i)), _mm512_loadu_ps(u + r * BLOCK + i)));
        const int64_t row = tile.first + r, at = row * (F / GROUP) + block;
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

  void place(const Layer& layer, const Cache& cache, int64_t t) {
    const int64_t H = m.head_dim, N = m.num_heads, K = m.num_kv_heads, position = s.positions[t];
    const float *row = qkv + t * (N + 2 * K) * H, *cos = m.cos + position * (H / 2), *sin = m.sin + position * (H / 2);
    uint16_t k[512], v[512];
    for (int64_t h = 0; h < N; ++h)
      turn_head(row + h * H, layer.q_norm, m.norm_eps, cos, sin, H, m.scale * LOG2_E, queries + (t * N + h) * H);
    for (int64_t h = 0; h < K; ++h) {
      turn_head(row + (N + h) * H, layer.k_norm, m.norm_eps, cos, sin, H, 1.f, k);
      for (int64_t d = 0; d < H; d += LANES)
        _mm256_storeu_si256((__m256i*)(v + d), narrow(_mm512_loadu_ps(row + (N + K + h) * H + d)));
      cache.store(tile_of(t), h, position % TILE, k, v);
    }
  }

  void attend_all(const Layer& layer, const Cache& cache) {
    const int64_t H = m.head_dim, N = m.num_heads, K = m.num_kv_heads, G = N / K;
    const int64_t tokens = 64 / G > 0 ? 64 / G : 1, num_items = (s.num_tokens + tokens - 1) / tokens * K;
    std::vector<Row> rows;
    for (int64_t item; (item = team().next.fetch_add(1)) < num_items;) {
      const int64_t head = item % K, begin = item / K * tokens, end = std::min(begin + tokens, s.num_tokens);
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
  }

  void logits(int thread, int n) {
    const int64_t D = m.hidden_size;
    const Rows rows = w.normed.get(s.num_rows, m.head);
    for (int64_t r = share(s.num_rows, thread, n); r < share(s.num_rows, thread + 1, n); ++r) {
      const float* row = x + s.rows[r] * D;
      quantize_row(row, inverse_rms(row, D, m.norm_eps), m.norm, D, m.head.bits, rows, r);
    }
    team().barrier();
    product(m.head, rows, s.num_rows, thread, n, s.logits);
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
  const Rows rows = space.normed.get(num_rows, *matrix);
  team().run(int(num_threads), [&](int thread) {
    const int n = int(num_threads);
    for (int64_t r = share(num_rows, thread, n); r < share(num_rows, thread + 1, n); ++r)
      quantize_row(x + r * matrix->num_ins, 1.f, nullptr, matrix->num_ins, matrix->bits, rows, r);
    team().barrier();
    const int64_t blocks = matrix->num_outs / BLOCK;
    each_tile(share(blocks, thread, n), share(blocks, thread + 1, n), num_rows, [&](int64_t block, RowTile tile) {
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

}  // extern "C"
