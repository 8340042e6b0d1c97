/* GPT-2 from token ids to logits, with the prefix as an argument of the attention layer: the
   JavaScript twin of minprefix/models/gpt2.py. Names, order and shapes are the same, so the two can
   be read side by side. Read `Attention`, then `Block`, then `GPT2`.

   What is simpler here: one text at a time (no batch B), inference only, weights in int8 with one
   scale for each output. Letters: tokens T, prefix positions P, layers L, heads H, width C, head
   width D = C / H, vocabulary V. All tensors are flat typed arrays. */

import { Products } from "./products.js";

/* A linear layer: y = scale * (W x) + bias. W (n_out, n_in) is int8, from docs/export_live.py. */
class Conv1D {
  constructor(tensors, name, products) {
    const weight = tensors.get(`${name}.weight`);
    [this.n_out, this.n_in] = weight.shape;
    this.scale = tensors.get(`${name}.scale`).data; // (n_out,)
    this.bias = tensors.get(`${name}.bias`)?.data; // (n_out,); the head has none
    this.weight = products.place(weight.data);
    this.products = products;
  }

  forward(x, T) {
    // (T, n_in) -> (T, n_out)
    const y = this.products.matmul(this.weight, x, T, this.n_out, this.n_in);
    for (let t = 0, i = 0; t < T; t++) {
      for (let o = 0; o < this.n_out; o++, i++)
        y[i] = y[i] * this.scale[o] + (this.bias ? this.bias[o] : 0);
    }
    return y;
  }
}

class LayerNorm {
  constructor(tensors, name, eps) {
    this.weight = tensors.get(`${name}.weight`).data; // (C,)
    this.bias = tensors.get(`${name}.bias`).data;
    this.eps = eps;
  }

  forward(x, T) {
    // (T, C) -> (T, C)
    const C = this.weight.length,
      y = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      let mean = 0,
        variance = 0;
      for (let c = 0; c < C; c++) mean += x[t * C + c] / C;
      for (let c = 0; c < C; c++) variance += (x[t * C + c] - mean) ** 2 / C;
      const factor = 1 / Math.sqrt(variance + this.eps);
      for (let c = 0; c < C; c++)
        y[t * C + c] = (x[t * C + c] - mean) * factor * this.weight[c] + this.bias[c];
    }
    return y;
  }
}

/* Attention of one query (D,) to n keys alone, of which `shown` says which are there (null = all).
   Key j begins at start + j * stride. Returns {o, lse, p}: the mean of the values (D,), the log of
   the softmax sum in nats (-Infinity without a key), and the weights p (n,), which sum to 1. */
export function attend(q, k, v, start, stride, n, shown = null) {
  const D = q.length,
    o = new Float64Array(D),
    p = new Float64Array(n);
  let most = -Infinity,
    Z = 0;
  for (let j = 0; j < n; j++) {
    let s = 0;
    for (let d = 0; d < D; d++) s += q[d] * k[start + j * stride + d];
    p[j] = shown && !shown[j] ? -Infinity : s / Math.sqrt(D);
    most = Math.max(most, p[j]);
  }
  if (most === -Infinity) return { o, lse: -Infinity, p: p.fill(0) };
  for (let j = 0; j < n; j++) Z += p[j] = Math.exp(p[j] - most);
  for (let j = 0; j < n; j++) {
    p[j] /= Z;
    for (let d = 0; d < D; d++) o[d] += p[j] * v[start + j * stride + d];
  }
  return { o, lse: most + Math.log(Z), p };
}

/* Equation (3) in one layer and head: one softmax over [prefix; text] is a mean of two,
   o = lambda o_P + (1 - lambda) o_S, lambda = r / (1 + r), r = gate exp(lse_P - lse_S). */
export function merge(prefix, text, gate) {
  const r = gate * Math.exp(prefix.lse - text.lse);
  const lambda = 1 / (1 + 1 / r); // r / (1 + r), also for r = 0 and for an infinite r
  return { r, lambda, o: text.o.map((x, d) => lambda * prefix.o[d] + (1 - lambda) * x) };
}

/* Multi-head self-attention over [prefix; tokens so far]. */
class Attention {
  constructor(tensors, name, nHead, products) {
    this.nHead = nHead;
    this.c_attn = new Conv1D(tensors, `${name}.c_attn`, products); // q, k and v in one product
    this.c_proj = new Conv1D(tensors, `${name}.c_proj`, products);
  }

  /* The two parts of what query q (D,) of a head sees: the prefix, and the first n tokens. */
  parts(q, h, prefix, cache, n) {
    const D = q.length,
      { P } = prefix;
    return [
      attend(q, prefix.k, prefix.v, h * P * D, D, prefix.on ? P : 0, prefix.shown), // k (H, P, D)
      attend(q, cache.k, cache.v, h * D, this.nHead * D, n), // k (S, H, D)
    ];
  }

  forward(x, T, prefix, cache, start, seen) {
    // (T, C) -> (T, C)
    const C = x.length / T,
      D = C / this.nHead,
      o = new Float32Array(T * C);
    const qkv = this.c_attn.forward(x, T); // (T, 3, H, D)
    for (let t = 0; t < T; t++) {
      const [q, k, v] = [0, 1, 2].map((i) => qkv.subarray((3 * t + i) * C, (3 * t + i + 1) * C));
      cache.k.set(k, (start + t) * C); // a later token is not in the cache yet: causal
      cache.v.set(v, (start + t) * C);
      cache.q.set(q, (start + t) * C); // kept for the page, which shows one head's numbers
      for (let h = 0; h < this.nHead; h++) {
        const [p, s] = this.parts(q.subarray(h * D, (h + 1) * D), h, prefix, cache, start + t + 1);
        const { o: merged, lambda } = merge(p, s, prefix.gate);
        o.set(merged, t * C + h * D);
        seen?.(start + t, h, lambda);
      }
    }
    return this.c_proj.forward(o, T);
  }
}

/* Two layers with the tanh form of GELU between them. */
class MLP {
  constructor(tensors, name, products) {
    this.c_fc = new Conv1D(tensors, `${name}.c_fc`, products);
    this.c_proj = new Conv1D(tensors, `${name}.c_proj`, products);
  }

  forward(x, T) {
    // (T, C) -> (T, C)
    const a = Math.sqrt(2 / Math.PI);
    const gelu = (u) => 0.5 * u * (1 + Math.tanh(a * (u + 0.044715 * u ** 3)));
    return this.c_proj.forward(this.c_fc.forward(x, T).map(gelu), T);
  }
}

/* x + attention(norm(x)), then x + mlp(norm(x)). */
class Block {
  constructor(tensors, name, config, products) {
    const eps = config.layer_norm_epsilon;
    this.ln_1 = new LayerNorm(tensors, `${name}.ln_1`, eps);
    this.attn = new Attention(tensors, `${name}.attn`, config.n_head, products);
    this.ln_2 = new LayerNorm(tensors, `${name}.ln_2`, eps);
    this.mlp = new MLP(tensors, `${name}.mlp`, products);
  }

  forward(x, T, prefix, cache, start, seen) {
    // (T, C) -> (T, C)
    const attended = this.attn.forward(this.ln_1.forward(x, T), T, prefix, cache, start, seen);
    x = x.map((value, i) => value + attended[i]);
    const added = this.mlp.forward(this.ln_2.forward(x, T), T);
    return x.map((value, i) => value + added[i]);
  }
}

/* Keys and values of the tokens read so far, with room for S of them. The prefix is not in it. */
export class KVCache {
  constructor(config, S) {
    const room = () => new Float32Array(S * config.n_embd); // (S, H, D)
    this.length = 0;
    this.layers = Array.from({ length: config.n_layer }, () => ({
      k: room(),
      v: room(),
      q: room(),
    }));
  }
}

/* P trained keys and values in each layer, (L, 2, H, P, D), and what the reader has changed. */
export class Prefix {
  constructor(table, shape, { gate = 1, shown = null, layersOff = [] } = {}) {
    [this.L, , this.H, this.P, this.D] = shape;
    Object.assign(this, { table, gate, shown, layersOff });
    this.offset = this.P; // token t stands at position t + P
  }

  static none({ n_layer, n_head, n_embd }) {
    return new Prefix(new Float32Array(0), [n_layer, 2, n_head, 0, n_embd / n_head]);
  }

  /* Keys of one prefix, values of another. */
  static swapped(keys, values) {
    const half = keys.H * keys.P * keys.D;
    const table = keys.table.map((key, i) => (Math.floor(i / half) % 2 ? values.table[i] : key));
    return new Prefix(table, [keys.L, 2, keys.H, keys.P, keys.D]);
  }

  layer(l) {
    // what one layer reads
    const half = this.H * this.P * this.D,
      part = (kv) => this.table.subarray((2 * l + kv) * half, (2 * l + kv + 1) * half);
    return {
      k: part(0),
      v: part(1),
      P: this.P,
      gate: this.gate,
      shown: this.shown,
      on: !this.layersOff.includes(l),
    };
  }
}

export class GPT2 {
  constructor(tensors, config, simd = true) {
    this.config = config;
    const products = new Products(tensors, simd);
    this.simd = products.simd;
    const embedding = (name) => ({
      weight: tensors.get(`${name}.weight`).data,
      scale: tensors.get(`${name}.scale`).data,
    });
    this.wte = embedding("wte"); // (V, C)
    this.wpe = embedding("wpe"); // (n_positions, C)
    const layers = [...Array(config.n_layer).keys()];
    this.h = layers.map((l) => new Block(tensors, `h.${l}`, config, products));
    this.ln_f = new LayerNorm(tensors, "ln_f", config.layer_norm_epsilon);
    this.head = new Conv1D(tensors, "wte", products); // tied: the token embedding
  }

  /* Reads `ids` after those in the cache. Returns the logits (V,) of the token after each of the
     last `wanted` ids; `seen(token, layer, head, lambda)` is called for each attention. */
  forward(ids, prefix, cache, { wanted = 1, seen = null } = {}) {
    const T = ids.length,
      C = this.config.n_embd,
      start = cache.length;
    if (start + T + prefix.offset > this.config.n_positions) {
      throw new Error(
        `too long: ${start + T} tokens after ${prefix.offset} prefix positions do not fit into ${this.config.n_positions} positions`,
      );
    }
    let x = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const z = ids[t],
        position = start + t + prefix.offset;
      for (let c = 0; c < C; c++) {
        x[t * C + c] =
          this.wte.weight[z * C + c] * this.wte.scale[z] +
          this.wpe.weight[position * C + c] * this.wpe.scale[position];
      }
    }
    this.h.forEach((block, l) => {
      const told = seen && ((t, h, lambda) => seen(t, l, h, lambda));
      x = block.forward(x, T, prefix.layer(l), cache.layers[l], start, told);
    });
    cache.length += T;
    if (!wanted) return [];
    const logits = this.head.forward(
      this.ln_f.forward(x.subarray((T - wanted) * C), wanted),
      wanted,
    );
    return Array.from({ length: wanted }, (_, i) =>
      logits.subarray(i * this.head.n_out, (i + 1) * this.head.n_out),
    );
  }
}

export const argmax = (x) => x.reduce((best, value, i) => (value > x[best] ? i : best), 0);

/* Probabilities of logits (V,): softmax. */
export function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b)),
    e = Float64Array.from(logits, (x) => Math.exp(x - most));
  const Z = e.reduce((a, b) => a + b);
  return e.map((x) => x / Z);
}
