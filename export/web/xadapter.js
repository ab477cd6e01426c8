// Runs a bundle in JavaScript: texts in, answers out. The same module serves the browser and Node.
//
// It knows neither of them: the caller passes in an onnxruntime (onnxruntime-web or onnxruntime-node), the
// classes of @huggingface/tokenizers, and a function that reads a file of the bundle. It does what
// xadapter_export/runtime does in Python, and answers the same.

const UNSAFE_PATH = /^\/|[\\:\0]|(^|\/)\.\.(\/|$)|^$/;
// What Python's str.split() splits on; JavaScript's \s has U+FEFF and lacks U+001C to U+001F and U+0085.
const WHITESPACE = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;
// The ideographs beyond U+FFFF that the tokenizers library puts spaces around.
const RARE_IDEOGRAPHS =
  /[\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu;
// Variants by what runs them, the most exact first: fp32 in the browser is fast enough for most bundles.
const PREFERRED = {
  cpu: ["onnx-fp32", "cpu-fp32", "cpu-int8"],
  webgpu: ["onnx-fp32", "onnx-fp16"],
};

/** An error whose message a user can act on. */
export class XAdapterError extends Error {
  name = "XAdapterError";

  /** `field`: "words" where a candidate is wrong; else it is the text, or the bundle. */
  constructor(message, field = undefined) {
    super(message);
    this.field = field;
  }
}

/**
 * A loaded bundle.
 *
 * Graphs are opened when they are first asked; an answer is made by one graph, in one run.
 */
export class XAdapterSession {
  #ort;
  #read;
  #options;
  #preferred;
  #sessions = new Map();
  #opened = new Set();
  #weights = new Map(); // bytes of files, until every expert set that shares them is open
  #plm;
  #clip = null;
  #running = Promise.resolve();

  /**
   * Load manifest and tokenizers; `open` or the first question loads a graph.
   *
   * @param {object} parts
   * @param {object} parts.ort onnxruntime-web or onnxruntime-node.
   * @param {object} parts.tokenizers The module @huggingface/tokenizers.
   * @param {(path: string, entry: object | null) => Promise<Uint8Array>} parts.read Reads a file of the bundle
   *   by its path in it; `entry` has its size and hash, and is null for the manifest.
   * @param {string} [parts.variant] Name of a variant, `onnx-fp32` or `cpu-int8`; the best for the provider
   *   if left out.
   * @param {string[]} [parts.providers] Execution providers; the CPU's if left out.
   * @returns {Promise<XAdapterSession>}
   */
  static async load({ ort, tokenizers, read, variant, providers }) {
    const session = new XAdapterSession();
    session.#ort = ort;
    session.#read = read;
    session.#options = providers ? { executionProviders: providers } : {};
    session.#preferred = variant ? [variant] : PREFERRED[providers?.includes("webgpu") ? "webgpu" : "cpu"];
    const manifest = parseManifest(await read("manifest.json", null));
    session.manifest = manifest;
    const make = async (path) => exactTokenizer(tokenizers, JSON.parse(decode(await session.readFile(path))));
    session.#plm = await make("tokenizer.json");
    if (manifest.clip) session.#clip = await make("clip_tokenizer.json");
    session.pictures = manifest.bank && manifest.files["bank.jsonl"]
      ? decode(await session.readFile("bank.jsonl")).trimEnd().split("\n").map((line) => JSON.parse(line))
      : [];
    return session;
  }

  /** The expert sets that the bundle holds. */
  get expertSets() {
    return Object.keys(this.manifest.expert_sets);
  }

  /** Read a file of the bundle and compare it with its hash, where the platform can. */
  async readFile(path) {
    const entry = this.manifest.files[path];
    if (UNSAFE_PATH.test(path)) throw new XAdapterError(`a path leaves the bundle: ${path}`);
    if (!entry) throw new XAdapterError(`the manifest does not list ${path}; export the bundle again`);
    const bytes = await this.#read(path, entry);
    if (bytes.length !== entry.size_bytes || !(await hasHash(bytes, entry.sha256))) {
      throw new XAdapterError(`${path} is not the file that the bundle was made with; copy the bundle again`);
    }
    return bytes;
  }

  /** The variant that answers for an expert set. */
  variant(experts = this.manifest.default_expert_set) {
    const found = this.manifest.variants.filter((variant) => variant.expert_set === experts);
    if (!found.length) {
      throw new XAdapterError(`the bundle has no expert set ${experts}, it has ${this.expertSets.join(", ")}`);
    }
    if (this.manifest.expert_sets[experts].split) {
      throw new XAdapterError(
        `expert set ${experts} is split into two graphs, of which this runs none; export it without --split and with --retrieval in-graph`,
      );
    }
    for (const name of this.#preferred) {
      const match = found.find((variant) => `${variant.target}-${variant.precision}` === name);
      if (match) return match;
    }
    const names = found.map((variant) => `${variant.target}-${variant.precision}`).join(", ");
    throw new XAdapterError(`none of ${this.#preferred.join(", ")} is in the bundle; it has ${names}`);
  }

  /** Open the graph of an expert set, if it is not open yet. */
  async open(experts = this.manifest.default_expert_set) {
    if (!this.#sessions.has(experts)) {
      const opening = this.#create(this.variant(experts));
      this.#sessions.set(experts, opening);
      opening.then(
        () => this.#dropWeights(experts),
        () => this.#sessions.delete(experts), // the next question tries again
      );
    }
    return this.#sessions.get(experts);
  }

  async #create({ file, weight_files: weightFiles }) {
    const [graph, ...weights] = await Promise.all([
      this.readFile(file),
      ...weightFiles.map((path) => this.#readWeights(path)),
    ]);
    const folder = file.slice(0, file.lastIndexOf("/") + 1);
    return this.#ort.InferenceSession.create(graph, {
      ...this.#options,
      // A graph names its weights by their path from its own folder.
      externalData: weightFiles.map((path, i) => ({ path: path.slice(folder.length), data: weights[i] })),
    });
  }

  #readWeights(path) {
    if (!this.#weights.has(path)) {
      const reading = this.readFile(path);
      this.#weights.set(path, reading);
      reading.catch(() => this.#weights.delete(path));
    }
    return this.#weights.get(path);
  }

  #dropWeights(experts) {
    this.#opened.add(experts);
    for (const path of this.#weights.keys()) {
      const users = this.manifest.variants.filter((variant) => variant.weight_files.includes(path));
      if (users.every((variant) => this.#opened.has(variant.expert_set))) this.#weights.delete(path);
    }
  }

  /** Whether a text must have a mask. */
  get fillsMasks() {
    const [spec] = Object.values(this.manifest.expert_sets);
    return spec.inputs.some((tensor) => tensor.name === "mask_positions");
  }

  /**
   * The graph's inputs for one text, as plain lists of integers; a batch of one.
   *
   * @returns {Record<string, number[]>}
   */
  encode(text, experts = this.manifest.default_expert_set) {
    if (typeof text !== "string" || !text.trim()) throw new XAdapterError("write a sentence");
    if (text.isWellFormed && !text.isWellFormed()) throw new XAdapterError("the text is not valid Unicode");
    const { plm } = this.manifest;
    const ids = this.#window(this.#plm.encode(text).ids, text);
    const inputs = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) };
    if (this.#clip) inputs.clip_input_ids = this.#encodeClip(text);
    const masks = ids.flatMap((id, i) => (id === plm.mask_token_id ? [i] : []));
    if (this.fillsMasks && !masks.length) {
      throw new XAdapterError(`write ${plm.mask_token} where the word should go`);
    }
    inputs.mask_positions = masks;
    inputs.keep_t = inputs.clip_input_ids?.map(() => 1); // a bundle with explanations can leave items out
    inputs.keep_v = Array(this.manifest.bank?.k ?? 0).fill(1);
    const wanted = this.manifest.expert_sets[experts].inputs.map((tensor) => tensor.name);
    return Object.fromEntries(wanted.map((name) => [name, inputs[name]]));
  }

  /** All ids, or those of the special tokens and of a window of the text that holds its masks. */
  #window(ids, text) {
    const { max_seq: maxSeq, mask_token: maskToken, mask_token_id: maskId } = this.manifest.plm;
    if (ids.length <= maxSeq) return ids;
    const inner = this.#plm.encode(text, { add_special_tokens: false }).ids;
    const numSpecial = ids.length - inner.length;
    const head = ids.findIndex((_, i) => inner.every((id, j) => ids[i + j] === id));
    const size = maxSeq - numSpecial;
    const first = inner.indexOf(maskId);
    const last = inner.lastIndexOf(maskId);
    if (maskToken !== null && first >= 0 && last - first + 1 > size) {
      throw new XAdapterError(`the masks are too far apart for one input: shorten the text between them`);
    }
    let start = 0;
    if (first >= 0 && last >= size) start = Math.min(Math.floor((first + last + 1 - size) / 2), inner.length - size);
    return [...ids.slice(0, head), ...inner.slice(start, start + size), ...ids.slice(head + inner.length)];
  }

  /** CLIP's ids of the sentence without its masks: start, text or a window of it around the masks, end. */
  #encodeClip(text) {
    const { context_length: limit, end_token_id: end, pad_token_id: pad, exact_at_true_length: exact } = this.manifest.clip;
    const mask = this.manifest.plm.mask_token;
    const clean = (part) => (mask ? part.replaceAll(mask, " ") : part).split(WHITESPACE).filter(Boolean).join(" ");
    const ids = this.#clip.encode(clean(text)).ids;
    if (ids.length <= limit) return exact ? ids : [...ids, ...Array(limit - ids.length).fill(pad)];
    const special = this.#clip.encode("").ids.length; // those before the text, and the one at its end
    const size = limit - special;
    const lengthBefore = (at) => this.#clip.encode(clean(text.slice(0, Math.max(at, 0))), { add_special_tokens: false }).ids.length;
    const first = mask ? lengthBefore(text.indexOf(mask)) : 0;
    let last = mask ? lengthBefore(text.lastIndexOf(mask)) : 0;
    if (last - first > size) last = first; // no window holds both
    const start = last >= size ? Math.min(Math.floor((first + last - size) / 2), ids.length - special - size) : 0;
    return [...ids.slice(0, special - 1), ...ids.slice(special - 1 + start, special - 1 + start + size), end];
  }

  /**
   * Answer a text.
   *
   * @param {string} text A sentence, with the mask token where a word should go if the bundle fills masks.
   * @param {object} [options]
   * @param {string} [options.experts] none, v, t or vt; the bundle's default if left out.
   * @param {number} [options.topK] How many answers for each mask.
   * @param {string[]} [options.candidates] Answer with one of these words only.
   * @returns {Promise<{answers: object[][], pictures: object[], milliseconds: number}>} For each mask, or once
   *   for the text, its answers `{word, score, logit}`, best first; the pictures that the model looked at,
   *   `{row, id, caption, score}`, nearest first; and how long tokenizing and running took.
   */
  async answer(text, { experts = this.manifest.default_expert_set, topK = 5, candidates } = {}) {
    const { labels } = this.manifest;
    const [spec] = Object.values(this.manifest.expert_sets); // a task gives the same with every set
    if (!spec.outputs.some((tensor) => tensor.name === "logits")) {
      throw new XAdapterError("this bundle gives embeddings, not answers");
    }
    const chosen = candidates?.length ? this.#choose(candidates) : null;
    const session = await this.open(experts);
    const { outputs, milliseconds } = await this.#inTurn(async () => {
      const start = performance.now();
      const feeds = {};
      for (const [name, ids] of Object.entries(this.encode(text, experts))) {
        feeds[name] = new this.#ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
      }
      const outputs = await session.run(feeds);
      return { outputs, milliseconds: performance.now() - start };
    });
    const logits = outputs.logits.data;
    const width = outputs.logits.dims.at(-1);
    const answers = [];
    for (let from = 0; from < logits.length; from += width) {
      const row = logits.subarray(from, from + width);
      const values = chosen ? chosen.map(({ column }) => row[column]) : row;
      const name = (i) => labels?.[i] ?? chosen?.[i].word ?? this.#word(i);
      answers.push(best(values, topK).map(([i, score]) => ({ word: name(i), score, logit: values[i] })));
    }
    const rows = outputs.retrieved ? Array.from(outputs.retrieved.data, Number) : [];
    const pictures = rows.map((row, i) => ({ row, ...this.pictures[row], score: outputs.retrieved_scores.data[i] }));
    return { answers, pictures, milliseconds };
  }

  /** One run at a time: a session of WebGPU takes no second one while it works. */
  #inTurn(work) {
    const result = this.#running.then(work);
    this.#running = result.catch(() => {});
    return result;
  }

  /** The columns of the logits that words stand for. */
  #choose(words) {
    const sliced = this.manifest.candidates;
    return words.map((word) => {
      const { ids, tokens } = this.#plm.encode(` ${word.trim()}`, { add_special_tokens: false });
      if (ids.length !== 1 || ["[UNK]", "<unk>"].includes(tokens[0])) {
        throw new XAdapterError(`not one word of the language model: "${word}"`, "words");
      }
      const column = sliced ? sliced.findIndex((candidate) => candidate.token_id === ids[0]) : ids[0];
      if (column < 0) throw new XAdapterError(`not a word that the bundle was exported for: "${word}"`, "words");
      return { word: word.trim(), column };
    });
  }

  #word(column) {
    const sliced = this.manifest.candidates;
    return sliced ? sliced[column].word : this.#plm.decode([column], { skip_special_tokens: false }).trim();
  }
}

/**
 * A tokenizer that gives the ids that the tokenizers library gives in Python.
 *
 * @huggingface/tokenizers 0.2 differs in two things: it lowercases a capital sigma at the end of a word to a
 * final one, and it does not put spaces around ideographs beyond U+FFFF.
 */
export function exactTokenizer({ Tokenizer }, json) {
  const tokenizer = new Tokenizer({ ...json, truncation: null, padding: null }, {});
  for (const part of tokenizer.normalizer?.normalizers ?? [tokenizer.normalizer]) {
    if (!part) continue;
    const { type, lowercase, handle_chinese_chars: spaced } = part.config;
    const normalize = part.normalize;
    part.normalize = function (text) {
      if (lowercase || type === "Lowercase") text = text.replaceAll("Σ", "σ");
      if (spaced) text = text.replace(RARE_IDEOGRAPHS, " $& ");
      return normalize.call(this, text);
    };
  }
  return tokenizer;
}

function parseManifest(bytes) {
  let manifest;
  try {
    manifest = JSON.parse(decode(bytes));
  } catch {
    throw new XAdapterError("manifest.json is not JSON: is this the folder of a bundle?");
  }
  if (manifest?.format_version !== 1) {
    throw new XAdapterError(`manifest.json is of format version ${manifest?.format_version}, this reads 1`);
  }
  return manifest;
}

function decode(bytes) {
  return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
}

/** Whether the bytes have a SHA-256; true where the platform cannot say (a page over plain http). */
async function hasHash(bytes, sha256) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) return true;
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** The places of the largest logits, best first, with their probabilities; a lone value is its own score. */
function best(logits, topK) {
  if (logits.length === 1) return [[0, logits[0]]];
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const weights = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = weights.reduce((a, b) => a + b);
  const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b);
  return order.slice(0, topK).map((i) => [i, weights[i] / sum]);
}
