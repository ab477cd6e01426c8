// Bundles in a folder, run by onnxruntime-node.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import * as tokenizers from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import { XAdapterError, XAdapterSession } from "./xadapter.js";

export * from "./xadapter.js";

/** Load a bundle from its folder. */
export function load(source, options = {}) {
  const folder = source instanceof URL ? fileURLToPath(source) : source;
  const read = async (name) => {
    try {
      return await readFile(path.join(folder, name));
    } catch (error) {
      throw new XAdapterError(`${folder} is not a whole bundle: ${name} cannot be read (${error.code})`);
    }
  };
  return XAdapterSession.load({ ort, tokenizers, read, ...options });
}
