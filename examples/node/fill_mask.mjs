// node fill_mask.mjs BUNDLE "The color of a banana is [MASK]." [--experts v] [--top-k 5] [--variant cpu-int8] [--json]

import { readFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import * as tokenizers from "@huggingface/tokenizers";
import ort from "onnxruntime-node";
import { XAdapterError, XAdapterSession } from "../../export/web/xadapter.js"; // copy it beside your own program

const { values, bundle, texts, topK } = readArguments();

try {
  const session = await XAdapterSession.load({
    ort,
    tokenizers,
    variant: values.variant,
    read: (name) => readFile(path.join(bundle, name)),
  });
  for (const text of texts) {
    const result = await session.answer(text, { experts: values.experts, topK });
    if (values.json) console.log(JSON.stringify({ text, ...result }));
    else print(text, result);
  }
} catch (error) {
  if (!(error instanceof XAdapterError) && !error.syscall) throw error; // a file that cannot be read has one
  const missing = error.syscall && `cannot read ${error.path} (${error.code}): is ${bundle} a bundle?`;
  console.error(`Error: ${missing || error.message}`);
  process.exit(1);
}

function readArguments() {
  const options = {
    experts: { type: "string" },
    "top-k": { type: "string", default: "5" },
    variant: { type: "string" },
    json: { type: "boolean", default: false },
  };
  let problem = "";
  try {
    const { values, positionals } = parseArgs({ allowPositionals: true, options });
    const [bundle, ...texts] = positionals;
    const topK = Number(values["top-k"]);
    if (texts.length && topK >= 1) return { values, bundle, texts, topK };
  } catch (error) {
    problem = `${error.message}; `;
  }
  console.error(
    `${problem}usage: node fill_mask.mjs BUNDLE TEXT... [--experts none|v|t|vt] [--top-k N] [--variant NAME] [--json]`,
  );
  process.exit(2);
}

function print(text, { answers, pictures, milliseconds }) {
  console.log(`${text}  (${milliseconds.toFixed(1)} ms)`);
  for (const ofMask of answers) {
    console.log(`  ${ofMask.map(({ word, score }) => `${word} ${(100 * score).toFixed(1)} %`).join(", ")}`);
  }
  if (pictures.length) console.log(`  looked at: ${pictures.map((picture) => picture.caption).join(", ")}`);
}
