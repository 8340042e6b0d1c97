/* The files that the page loads: tensors (safetensors), the tokenizer (vocab.json, merges.txt). */

/* fp16 bits -> number. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const ARRAYS = {
  I8: (bytes) => new Int8Array(bytes),
  F32: (bytes) => new Float32Array(bytes),
  F16: (bytes) => Float32Array.from(new Uint16Array(bytes), half),
};

/* safetensors: the length of the header, the header as JSON, then the bytes of the tensors.
   Returns a Map from each name to {shape, data}. */
export function readTensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  delete header.__metadata__;
  return new Map(
    Object.entries(header).map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [from, to],
        },
      ]) => [name, { shape, data: ARRAYS[dtype](buffer.slice(8 + size + from, 8 + size + to)) }],
    ),
  );
}

/* Words as GPT-2 cuts them: minprefix/models/tokenizer.py has the same expression. */
const WORD =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}/gu;

/* The character that stands for each byte in the files: itself if printable, else one from U+0100
   on. */
function byteChars() {
  let moved = 0x100;
  const printable = (b) => (b > 0x20 && b < 0x7f) || (b > 0xa0 && b !== 0xad);
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : moved++));
}

/* The byte-level BPE tokenizer of GPT-2. */
export class Tokenizer {
  constructor(vocab, merges) {
    this.vocab = vocab;
    this.tokens = [];
    for (const [token, id] of Object.entries(vocab)) this.tokens[id] = token;
    const chars = byteChars();
    this.charOf = chars;
    this.byteOf = new Map(chars.map((char, byte) => [char, byte]));
    const pairs = merges.split("\n").filter((line) => line && !line.startsWith("#version"));
    this.rank = new Map(); // of a merged token: the number of its first merge
    pairs.forEach((pair, n) => {
      const token = pair.replace(" ", "");
      if (!this.rank.has(token)) this.rank.set(token, n);
    });
  }

  encode(text) {
    return [...text.matchAll(WORD)].flatMap(([word]) => {
      const parts = Array.from(new TextEncoder().encode(word), (byte) => this.charOf[byte]);
      for (;;) {
        // merge the pair whose token came first in training, until none is left
        let best = -1,
          rank = Infinity;
        for (let i = 0; i + 1 < parts.length; i++) {
          const found = this.rank.get(parts[i] + parts[i + 1]) ?? Infinity;
          if (found < rank) [best, rank] = [i, found];
        }
        if (best < 0) break;
        parts.splice(best, 2, parts[best] + parts[best + 1]);
      }
      return parts.map((part) => this.vocab[part]);
    });
  }

  decode(ids) {
    // special tokens are left out
    const bytes = ids.flatMap((id) => {
      const known = [...this.tokens[id]].map((char) => this.byteOf.get(char));
      return this.tokens[id] === "<|endoftext|>" ? [] : known;
    });
    return new TextDecoder().decode(Uint8Array.from(bytes));
  }
}
