// The whole network of a UniAD in evaluation, one call: tokens in, their reconstruction out, in float32 on a CPU.
//
// Phases are the network's products, attentions and norms; all threads share each, and wait for each other after it.
// What stands between two products happens in the first one's tiles, or where the norm passes by anyway.

#include "panel_attention.h"
#include "panels.h"
#include "scratch.h"
#include "tasks.h"

namespace uniad {
namespace {

constexpr int64_t TOGETHER = 16 * 1024 * 1024;  // bytes
constexpr int64_t PARTS = 8;                    // of a phase, for each thread

#if defined(UNIAD_AMX)
using Most = Tiled;  // what there is for bfloat16, where `has_tiles`
#else
using Most = Brain;
#endif

struct Sizes {
  int64_t batch, tokens, channels, width, heads, hidden, encoder_layers, decoder_layers;
};

struct Linear {
  const float *weight, *bias;
};

struct Norm {
  const float *weight, *bias;
  double eps;  // a pointer's size, so that all of a network is one array of words
};

struct Attention {
  Linear in, out;        // `in` of query, key and value together
  const uint32_t* seen;  // see `panel_attention`, or null where every key is seen
};

struct EncoderLayer {
  Attention attention;
  Norm norm1;
  Linear linear1, linear2;
  Norm norm2;
};

struct DecoderLayer {
  const float *embed, *query;  // [N, width] each: the learned query, and its projection for the first attention
  Attention first, second;
  Norm norm1, norm2;
  Linear linear1, linear2;
  Norm norm3;
};

// Tokens as the caller has them, in float32: strides in elements.
struct Rows {
  float* data;
  int64_t batch_stride, token_stride, channel_stride;
};

// Working memory, for a number of sequences.
struct Buffers {
  float *position, *embed, *query;  // of one sequence
  float *tokens, *placed;           // activations, and the same plus the position
  float *memory, *memory_placed;    // the encoder's output
  float *out, *out_placed;          // the previous decoder layer's
  float *projected, *attended, *hidden, *ends;
  float* weights;  // of attention, a part for each thread
  int64_t attention_words;
  uint32_t* pairs; // of products of bfloat16, likewise
  int64_t pair_words;
  bool in_tiles;
  int64_t threads;

  Buffers(Scratch& scratch, const Sizes& s, int64_t together, int64_t threads, bool in_bfloat16)
      : threads(threads) {
    const Tokens n{s.tokens};
    const auto take = [&](int64_t channels, int64_t sequences) {
      return scratch.take<float>(channels * sequences * n.padded());
    };
    for (float** one : {&position, &embed, &query}) *one = take(s.width, 1);
    for (float** all : {&tokens, &placed, &memory, &memory_placed, &out, &out_placed, &attended})
      *all = take(s.width, together);
    projected = take(3 * s.width, together);
    hidden = take(s.hidden, together);
    ends = take(s.channels, together);
    in_tiles = in_bfloat16 && has_tiles();
    const int64_t most = std::max({s.width, s.hidden, s.channels});
    pair_words = in_tiles ? pair_room<Most>(most) : in_bfloat16 ? pair_room<Brain>(most) : 0;
    attention_words = in_tiles ? TiledRoom(n, s.width / s.heads).words() : s.tokens * PANEL;
    weights = scratch.take<float>(threads * attention_words);
    pairs = scratch.take<uint32_t>(threads * pair_words);
  }
};

class Network {
 public:
  Network(const Sizes& s, const Buffers& b, int64_t batch) : s_(s), b_(b), n_{s.tokens}, batch_(batch) {}

  void run(const EncoderLayer* encoder, const DecoderLayer* decoder, const Norm& norm, const Linear& input,
           const Linear& output, const float* position, const Rows& in, const Rows& out) {
    each_panel([&](int64_t i, int64_t panel) {
      to_panel(in, i, panel, s_.channels, of(b_.ends, s_.channels));
      if (i == 0) to_panel({(float*)position, 0, s_.width, 1}, 0, panel, s_.width, of(b_.position, s_.width));
    });
    multiply(input, s_.channels, s_.width, of(b_.ends, s_.channels), of(b_.tokens, s_.width));
    each_panel([&](int64_t i, int64_t panel) { place(i, panel, b_.tokens, b_.placed); });
    for (int64_t l = 0; l < s_.encoder_layers; l++) {
      const bool last = l + 1 == s_.encoder_layers;
      encode(encoder[l], last ? b_.memory : b_.tokens, last ? b_.memory_placed : b_.placed);
    }
    if (s_.encoder_layers == 0) {
      std::swap(b_.memory, b_.tokens);
      std::swap(b_.memory_placed, b_.placed);
    }
    const float *previous = b_.memory, *previous_placed = b_.memory_placed;
    for (int64_t l = 0; l < s_.decoder_layers; l++) {
      decode(decoder[l], previous, previous_placed);
      previous = b_.out;
      previous_placed = b_.out_placed;
    }
    each_panel([&](int64_t i, int64_t panel) { normalize(norm, i, panel, previous, b_.tokens, nullptr); });
    multiply(output, s_.width, s_.channels, of(b_.tokens, s_.width), of(b_.ends, s_.channels));
    each_panel([&](int64_t i, int64_t panel) { from_panel(of(b_.ends, s_.channels), i, panel, s_.channels, out); });
  }

 private:
  void encode(const EncoderLayer& l, float* out, float* out_placed) {
    const Panels tokens = of(b_.tokens, s_.width), placed = of(b_.placed, s_.width);
    project(l.attention.in, 0, 2, placed);
    project(l.attention.in, 2, 3, tokens);
    attend(l.attention, {b_.projected, 3 * s_.width * n_.padded(), 3 * s_.width});
    add(l.attention.out, s_.width, of(b_.attended, s_.width), tokens, tokens);
    each_panel([&](int64_t i, int64_t panel) { normalize(l.norm1, i, panel, b_.tokens, b_.tokens, nullptr); });
    feed_forward(l.linear1, l.linear2);
    each_panel([&](int64_t i, int64_t panel) { normalize(l.norm2, i, panel, b_.tokens, out, out_placed); });
  }

  void decode(const DecoderLayer& l, const float* previous, const float* previous_placed) {
    const Panels tokens = of(b_.tokens, s_.width);
    const Panels embed{b_.embed, 0, s_.width}, query{b_.query, 0, s_.width};
    each_panel([&](int64_t i, int64_t panel) {
      if (i > 0) return;
      to_panel({(float*)l.embed, 0, s_.width, 1}, 0, panel, s_.width, embed);
      to_panel({(float*)l.query, 0, s_.width, 1}, 0, panel, s_.width, query);
    });
    project(l.first.in, 1, 2, of(b_.memory_placed, s_.width));
    project(l.first.in, 2, 3, of(b_.memory, s_.width));
    attend(l.first, query);
    add(l.first.out, s_.width, of(b_.attended, s_.width), embed, tokens);
    each_panel([&](int64_t i, int64_t panel) { normalize(l.norm1, i, panel, b_.tokens, b_.tokens, b_.placed); });
    project(l.second.in, 0, 1, of(b_.placed, s_.width));
    project(l.second.in, 1, 2, of((float*)previous_placed, s_.width));
    project(l.second.in, 2, 3, of((float*)previous, s_.width));
    attend(l.second, {b_.projected, 3 * s_.width * n_.padded(), 3 * s_.width});
    add(l.second.out, s_.width, of(b_.attended, s_.width), tokens, tokens);
    each_panel([&](int64_t i, int64_t panel) { normalize(l.norm2, i, panel, b_.tokens, b_.tokens, nullptr); });
    feed_forward(l.linear1, l.linear2);
    each_panel([&](int64_t i, int64_t panel) { normalize(l.norm3, i, panel, b_.tokens, b_.out, b_.out_placed); });
  }

  // Input projections first .. last - 1 of (query, key, value), into their channels of `projected`.
  void project(const Linear& in, int64_t first, int64_t last, Panels from) {
    const int64_t row = first * s_.width;
    const Linear part{in.weight + row * s_.width, in.bias ? in.bias + row : nullptr};
    multiply(part, s_.width, (last - first) * s_.width, from,
             {b_.projected, 3 * s_.width * n_.padded(), 3 * s_.width, row});
  }

  void attend(const Attention& a, Panels query) {
    Panels key{b_.projected, 3 * s_.width * n_.padded(), 3 * s_.width, s_.width}, value = key;
    value.first = 2 * s_.width;
    const int64_t panels = n_.panels(), count = batch_ * s_.heads * panels;
    phase([&](int64_t part, int64_t parts, int64_t thread) {
      float* weights = b_.weights + thread * b_.attention_words;
      const Share share(count, part, parts);
#if defined(UNIAD_AMX)
      if (b_.in_tiles) return attend_in_tiles(a, query, key, value, share, (uint32_t*)weights);
#endif
      for (int64_t i = share.begin; i < share.end; i++) {
        const int64_t sequence = i / panels / s_.heads, head = i / panels % s_.heads;
        panel_attention(n_, s_.width / s_.heads, query, key, value, of(b_.attended, s_.width), a.seen, sequence, head,
                        i % panels, weights);
      }
    });
  }

#if defined(UNIAD_AMX)
  // A thread's share of (sequence, head, panel of queries).
  void attend_in_tiles(const Attention& a, Panels query, Panels key, Panels value, Share share, uint32_t* room) {
    const int64_t panels = n_.panels(), head_dim = s_.width / s_.heads, first = key.first, second = value.first;
    const Tiles tiles;
    TiledAttention attention(n_, head_dim, room);
    for (int64_t i = share.begin; i < share.end; i++) {
      const int64_t sequence = i / panels / s_.heads, channel = i / panels % s_.heads * head_dim, panel = i % panels;
      if (i == share.begin || panel == 0) {
        key.first = first + channel;
        value.first = second + channel;
        attention.take({key, sequence}, {value, sequence});
      }
      const int64_t width = n_.width(panel);
      const float* q = query.at(sequence, panel, width) + channel * width;
      float* out = of(b_.attended, s_.width).at(sequence, panel, width) + channel * width;
      const uint32_t* seen = a.seen ? a.seen + panel * n_.count : nullptr;
      if (width == PANEL)
        attention.run<2>(q, seen, out);
      else
        attention.run<1>(q, seen, out);
    }
  }
#endif

  void feed_forward(const Linear& linear1, const Linear& linear2) {
    const Panels tokens = of(b_.tokens, s_.width), hidden = of(b_.hidden, s_.hidden);
    multiply(linear1, s_.width, s_.hidden, tokens, hidden, true);
    add(linear2, s_.hidden, hidden, tokens, tokens);
  }

  void multiply(const Linear& l, int64_t ins, int64_t outs, Panels in, Panels out, bool relu = false) {
    run_product({l.weight, l.bias, ins, outs, relu}, in, out);
  }

  // out = residual + l(in), of the network's width.
  void add(const Linear& l, int64_t ins, Panels in, Panels residual, Panels out) {
    run_product({l.weight, l.bias, ins, s_.width, false, residual}, in, out);
  }

  void run_product(const Product& p, Panels in, Panels out) {
    phase([&](int64_t part, int64_t parts, int64_t thread) {
      if (b_.in_tiles)
        multiply_panels<Most>(p, batch_, n_, in, out, part, parts, b_.pairs + thread * b_.pair_words);
      else if (b_.pair_words)
        multiply_panels<Brain>(p, batch_, n_, in, out, part, parts, b_.pairs + thread * b_.pair_words);
      else
        multiply_panels<Single>(p, batch_, n_, in, out, part, parts, nullptr);
    });
  }

  // to = from + position.
  void place(int64_t i, int64_t panel, const float* from, float* to) {
    const int64_t at = i * s_.width * n_.padded() + panel * PANEL * s_.width, count = n_.width(panel) * s_.width;
    const float* position = b_.position + panel * PANEL * s_.width;
    for (int64_t k = 0; k < count; k += LANES)
      store(to + at + k, load<vfloat>(from + at + k) + load<vfloat>(position + k));
  }

  // to = LayerNorm(from), and placed = that + position unless it is null.
  void normalize(const Norm& norm, int64_t i, int64_t panel, const float* from, float* to, float* placed) {
    const int64_t at = i * s_.width * n_.padded() + panel * PANEL * s_.width;
    const float* position = b_.position + panel * PANEL * s_.width;
    norm_panel(norm.weight, norm.bias, (float)norm.eps, s_.width, n_.width(panel), from + at, to + at, position,
               placed ? placed + at : nullptr);
  }

  Panels of(float* data, int64_t channels) const { return {data, channels * n_.padded(), channels}; }

  // f(sequence, panel) for every one.
  template <class F> void each_panel(F f) {
    phase([&](int64_t part, int64_t parts, int64_t) {
      const Share share(batch_ * n_.panels(), part, parts);
      for (int64_t i = share.begin; i < share.end; i++) f(i / n_.panels(), i % n_.panels());
    });
  }

  // f(part, parts, thread) for all parts, on all of torch's threads. A thread's own are what it had in the phase before.
  template <class F> void phase(F f) {
    const int64_t parts = b_.threads * (b_.pair_words ? 1 : PARTS);  // a part rounds its weights anew
    over_tasks(parts, [&](int64_t part, int64_t thread) { f(part, parts, thread); });
  }

  // A panel's tokens from rows; lanes beyond the last token are zero.
  void to_panel(const Rows& rows, int64_t i, int64_t panel, int64_t channels, Panels out) const {
    const int64_t width = n_.width(panel), first = panel * PANEL, valid = std::min(width, n_.count - first);
    const float* from = rows.data + i * rows.batch_stride + first * rows.token_stride;
    float* to = out.at(i, panel, width);
    if (rows.channel_stride == 1) {
      transpose_rows(from, rows.token_stride, to, width, valid, channels);
      return;
    }
    for (int64_t c = 0; c < channels; c++)
      for (int64_t t = 0; t < width; t++)
        to[c * width + t] = t < valid ? from[t * rows.token_stride + c * rows.channel_stride] : 0.f;
  }

  void from_panel(Panels in, int64_t i, int64_t panel, int64_t channels, const Rows& rows) const {
    const int64_t width = n_.width(panel), first = panel * PANEL, valid = std::min(width, n_.count - first);
    const float* from = in.at(i, panel, width);
    float* to = rows.data + i * rows.batch_stride + first * rows.token_stride;
    for (int64_t t = 0; t < valid; t += LANES) {
      const int64_t lanes = std::min<int64_t>(LANES, valid - t);
      int64_t c = 0;
      if (lanes == LANES && rows.channel_stride == 1)
        for (; c + LANES <= channels; c += LANES)
          transpose((const uint32_t*)from + c * width + t, width, (uint32_t*)to + t * rows.token_stride + c,
                    rows.token_stride);
      for (; c < channels; c++)
        for (int64_t k = t; k < t + lanes; k++)
          to[k * rows.token_stride + c * rows.channel_stride] = from[c * width + k];
    }
  }

  static void transpose_rows(
      const float* from, int64_t stride, float* to, int64_t width, int64_t valid, int64_t channels) {
    for (int64_t t = 0; t < width; t += LANES) {
      int64_t c = 0;
      if (t + LANES <= valid)
        for (; c + LANES <= channels; c += LANES)
          transpose((const uint32_t*)from + t * stride + c, stride, (uint32_t*)to + c * width + t, width);
      for (; c < channels; c++)
        for (int64_t k = t; k < t + LANES; k++) to[c * width + k] = k < valid ? from[k * stride + c] : 0.f;
    }
  }

  Sizes s_;
  Buffers b_;
  Tokens n_;
  int64_t batch_;
};

}  // namespace
}  // namespace uniad

extern "C" {

int64_t uniad_panel() { return uniad::PANEL; }

// Whether products can take pairs of bfloat16.
int64_t uniad_has_pairs() { return uniad::Brain::PAIR == 2 || uniad::has_tiles(); }

// Whether they are made by tiles.
int64_t uniad_has_tiles() { return uniad::has_tiles(); }

// tensors: a network as an array of words, in the order of the structures above: encoder layers, decoder layers, the
// last norm, the projections of input and output. strides: (batch, token, channel) of `in` and of `out`. in_bfloat16:
// operands of the linear layers' products are rounded to it where `uniad_has_pairs`, and by tiles those of attention too;
// all else is float32.
void uniad_reconstruct(
    const uniad::Sizes* s, const void* const* network, const float* position, const float* in, float* out,
    const int64_t* strides, int64_t in_bfloat16) {
  using namespace uniad;
  // So many sequences at a time that what they leave between two products stays in the last-level cache.
  const int64_t one = Tokens{s->tokens}.padded() * (11 * s->width + s->hidden + s->channels) * (int64_t)sizeof(float);
  const int64_t together = std::clamp<int64_t>(TOGETHER / std::max<int64_t>(one, 1), 1, s->batch);
  Scratch scratch;
  const Buffers buffers(scratch, *s, together, at::get_num_threads(), in_bfloat16);
  const auto* encoder = (const EncoderLayer*)network;
  const auto* decoder = (const DecoderLayer*)(encoder + s->encoder_layers);
  const auto* norm = (const Norm*)(decoder + s->decoder_layers);
  const auto* ends = (const Linear*)(norm + 1);
  for (int64_t i = 0; i < s->batch; i += together) {
    Network run(*s, buffers, std::min(together, s->batch - i));
    run.run(encoder, decoder, *norm, ends[0], ends[1], position,
            {(float*)in + i * strides[0], strides[0], strides[1], strides[2]},
            {out + i * strides[3], strides[3], strides[4], strides[5]});
  }
}
}
