/** An expert set of a bundle: `none`, `v`, `t`, `vt`, or one of another package. */
export type Experts = string;

/** One answer for a mask, or for the text. */
export interface Answer {
  /** The word, or the label. */
  word: string;
  /** Its probability, from 0 to 1; of a regression, the value. */
  score: number;
  logit: number;
}

/** A picture of the bank that the model looked at. */
export interface Picture {
  /** Its row in the bank. */
  row: number;
  id: string;
  caption: string;
  /** Its similarity to the text, from -1 to 1. */
  score: number;
}

export interface Result {
  /** For each mask, or once for the text, the answers, best first. */
  answers: Answer[][];
  /** Nearest first; none where the expert set looks at no pictures. */
  pictures: Picture[];
  /** How long tokenizing and running took. */
  milliseconds: number;
}

/** Size and hash of a file of a bundle. */
export interface FileEntry {
  size_bytes: number;
  sha256: string;
}

export interface LoadOptions {
  /** Name of a variant, `onnx-fp32` or `cpu-int8`; the best for the provider if left out. */
  variant?: string;
  /** Execution providers of onnxruntime; the CPU's if left out. */
  providers?: string[];
}

/** What `XAdapterSession.load` is made of, for a runtime or a storage of your own. */
export interface Parts extends LoadOptions {
  /** onnxruntime-node or onnxruntime-web. */
  ort: unknown;
  /** The module @huggingface/tokenizers. */
  tokenizers: unknown;
  /** Reads a file of the bundle by its path in it; `entry` is null for the manifest. */
  read: (path: string, entry: FileEntry | null) => Promise<Uint8Array>;
}

/** An error whose message a user can act on. */
export class XAdapterError extends Error {
  /** "words" if a candidate is wrong. */
  readonly field?: string;
}

/** A loaded bundle. Graphs are opened when they are first asked. */
export class XAdapterSession {
  static load(parts: Parts): Promise<XAdapterSession>;
  /** The contents of manifest.json. */
  readonly manifest: Record<string, unknown>;
  /** The pictures of the bank, in the order of its rows. */
  readonly pictures: { id: string; caption: string }[];
  /** The expert sets that the bundle holds. */
  get expertSets(): Experts[];
  /** Whether a text must have a mask. */
  get fillsMasks(): boolean;
  /** Open the graph of an expert set, if it is not open yet. */
  open(experts?: Experts): Promise<unknown>;
  /** The graph's inputs for one text, as plain lists of integers. */
  encode(text: string, experts?: Experts): Record<string, number[]>;
  /**
   * Answer a text.
   *
   * @param text A sentence, with the mask token where a word should go if the bundle fills masks.
   * @throws XAdapterError if the text or an option is not one that the bundle can answer.
   */
  answer(
    text: string,
    options?: {
      /** The bundle's default if left out. */
      experts?: Experts;
      /** How many answers for each mask; 5 if left out. */
      topK?: number;
      /** Answer with one of these words only. */
      candidates?: string[];
    },
  ): Promise<Result>;
}

/**
 * Load a bundle: in Node from its folder, in the browser from the address of its folder.
 *
 * `xadapter/core` has no `load`, and needs no onnxruntime package.
 */
export function load(source: string | URL, options?: LoadOptions): Promise<XAdapterSession>;
