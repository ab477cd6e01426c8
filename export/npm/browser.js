// Bundles at an address, run by onnxruntime-web.

import * as tokenizers from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";
import { XAdapterError, XAdapterSession } from "./xadapter.js";

export * from "./xadapter.js";

/** Load a bundle from the address of its folder. */
export function load(address, options = {}) {
  const folder = new URL(`${address}`.replace(/\/?$/, "/"), globalThis.location?.href);
  const read = async (name) => {
    const response = await fetch(new URL(name, folder));
    if (!response.ok) throw new XAdapterError(`${folder} is not a whole bundle: ${name} is missing (${response.status})`);
    return new Uint8Array(await response.arrayBuffer());
  };
  return XAdapterSession.load({ ort, tokenizers, read, ...options });
}
