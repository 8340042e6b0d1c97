/* One text of the page: what the model reads, what it writes, and what happened inside.

   `Live` holds the model, the tokenizer and the prefixes; `Writing` writes one text greedily. A
   task is {source, ask, prefix}: `ask` says how the source is put to the model (`promptIds`),
   `prefix` which keys and values it reads beside it, and what the reader has changed (`prefixOf`). */

import { GPT2, KVCache, Prefix, argmax, merge, softmax } from "./gpt2.js";
import { Tokenizer, readTensors } from "./files.js";

export const MAX_NEW = 80; // tokens
const SHOWN = 5; // next tokens with the prefix, and as many without

export class Live {
  /* files: {config, vocab: objects; merges: text; weights: ArrayBuffer; prefixes: two of them} */
  constructor({ config, vocab, merges, weights, prefixes }, simd = true) {
    this.tokenizer = new Tokenizer(vocab, merges);
    this.model = new GPT2(readTensors(weights), config, simd);
    this.prefixes = new Map(prefixes.flatMap((file) => [...readTensors(file)])); // by name
  }

  promptIds(source, { template, before, after }) {
    const encode = (text) => this.tokenizer.encode(text);
    // an instruction, a searched prompt, or the frame that prefixes learn in
    if (template !== undefined) return encode(template.replaceAll("{table}", source));
    if (before) return [...before, ...encode(source), ...after];
    return [...encode(source), this.model.config.bos_token_id];
  }

  /* {keys, values: names of prefixes; gate; shown: P booleans; layersOff: layers} or null. */
  prefixOf(chosen) {
    if (!chosen) return Prefix.none(this.model.config);
    const [keys, values] = [chosen.keys, chosen.values].map((name) => {
      const { data, shape } = this.prefixes.get(name);
      return new Prefix(data, shape);
    });
    const { gate = 1, shown = null, layersOff = [] } = chosen;
    return Object.assign(chosen.keys === chosen.values ? keys : Prefix.swapped(keys, values), {
      gate,
      shown,
      layersOff,
    });
  }
}

export class Writing {
  constructor(live, { source, ask, prefix }) {
    this.live = live;
    // the text after an instruction or a searched prompt ends at a line break
    this.oneLine = ask.template !== undefined || ask.before !== undefined;
    this.prompt = live.promptIds(source, ask);
    this.prefix = live.prefixOf(prefix);
    const { n_layer: L, n_head: H } = live.model.config,
      room = this.prompt.length + MAX_NEW;
    this.cache = new KVCache(live.model.config, room);
    this.lambda = new Float32Array(room * L * H); // (T, L, H)
    this.seen = (t, l, h, lambda) => (this.lambda[(t * L + l) * H + h] = lambda);
    this.ids = []; // what is written
    this.logits = []; // (V,) after the prompt, then after each written token
    this.done = false;
  }

  /* Reads what is new, chooses one more token. */
  next() {
    const { model } = this.live;
    const read = this.ids.length ? this.ids.slice(-1) : this.prompt;
    const [logits] = model.forward(read, this.prefix, this.cache, { seen: this.seen });
    this.logits.push(logits);
    const token = argmax(logits);
    if (token === model.config.eos_token_id) return this.end();
    this.ids.push(token);
    if (this.ids.length === MAX_NEW || (this.oneLine && /\S\s*\n/.test(this.decoded()))) this.end();
  }

  end() {
    this.done = true;
  }

  decoded() {
    return this.live.tokenizer.decode(this.ids);
  }

  text() {
    // a character of which bytes are missing is not shown yet
    const text = this.decoded().trim();
    return (this.oneLine ? text.split("\n")[0].trim() : text).replace(/\uFFFD+$/, "");
  }

  /* What the model has read: its tokens as texts, the share lambda of the prefix in each attention
     (T, L, H), and from the prompt's last token on the likeliest next tokens, with and without the
     prefix: [text, p with, p without]. */
  trace() {
    const { model, tokenizer } = this.live,
      { n_layer, n_head } = model.config;
    const T = this.cache.length,
      ids = [...this.prompt, ...this.ids].slice(0, T);
    const n = this.logits.length,
      first = T - n; // the first token after which it wrote
    const frozen = model.forward(ids, Prefix.none(model.config), new KVCache(model.config, T), {
      wanted: n,
    });
    const nexts = this.logits.map((logits, i) => {
      const [p, q] = [softmax(logits), softmax(frozen[i])];
      const likeliest = (x) => [...x.keys()].sort((a, b) => x[b] - x[a]).slice(0, SHOWN);
      const both = [...new Set([...likeliest(p), ...likeliest(q)])];
      return both.map((id) => [tokenText(tokenizer, id), p[id], q[id]]);
    });
    const tokens = ids.map((id) => tokenText(tokenizer, id));
    return { tokens, first, nexts, lambda: this.lambda.slice(0, T * n_layer * n_head) };
  }

  /* The numbers of equation (3) for one token as the query, in one layer and head. */
  inspect(token, layer, head) {
    const { attn } = this.live.model.h[layer],
      cache = this.cache.layers[layer];
    const { D, H, P } = this.prefix,
      from = token * H * D + head * D;
    const parts = attn.parts(
      cache.q.subarray(from, from + D),
      head,
      this.prefix.layer(layer),
      cache,
      token + 1,
    );
    const [prefix, text] = parts,
      { o, r, lambda } = merge(prefix, text, this.prefix.gate);
    const some = (x) => Array.from(x.slice(0, 3));
    return {
      token,
      layer,
      head,
      P,
      r,
      lambda,
      gate: this.prefix.gate,
      lseP: prefix.lse,
      lseS: text.lse,
      oP: some(prefix.o),
      oS: some(text.o),
      o: some(o),
      prefixShares: Array.from(prefix.p, (p) => lambda * p),
      textShares: Array.from(text.p, (p) => (1 - lambda) * p),
    };
  }
}

const tokenText = (tokenizer, id) => tokenizer.decode([id]) || tokenizer.tokens[id];
