// Before `npm pack`: what the package takes from elsewhere in the repository.

import { copyFile } from "node:fs/promises";

const here = new URL("./", import.meta.url);
await copyFile(new URL("../web/xadapter.js", here), new URL("xadapter.js", here));
await copyFile(new URL("../../LICENSE", here), new URL("LICENSE", here));
