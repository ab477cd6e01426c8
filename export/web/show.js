// Draws answers and pictures. Everything that comes from a bundle is set as text.

function element(tag, className, textContent = "") {
  return Object.assign(document.createElement(tag), { className, textContent });
}

/** A bar for each answer, mask by mask. */
export function showAnswers(place, answers) {
  const lists = answers.flatMap((ofMask, mask) => {
    const list = element("ol", "bars");
    for (const { word, score } of ofMask) {
      const item = element("li", "");
      const bar = element("span", "bar");
      bar.setAttribute("aria-hidden", "true");
      bar.append(element("span", "fill"));
      bar.firstChild.style.width = `${100 * Math.min(1, Math.max(0, score))}%`;
      const share = element("data", "share", `${(100 * score).toFixed(1)} %`);
      share.value = score;
      item.append(element("span", "word", word), bar, share);
      list.append(item);
    }
    return answers.length > 1 ? [element("h3", "", `Blank ${mask + 1}`), list] : [list];
  });
  place.replaceChildren(...lists);
}

/** A card for each picture: the picture where there is one, its caption, how near it is. */
export function showPictures(place, pictures, sheets) {
  place.replaceChildren(
    ...pictures.map(({ row, caption, score }) => {
      const card = element("li", "picture");
      const tile = sheets.tile(row);
      if (tile) card.append(tile);
      card.append(element("span", "caption", caption), element("span", "quiet", `similarity ${score.toFixed(2)}`));
      return card;
    }),
  );
}

/** Thumbnails of the bank in sheets of many each; none where the page was built without them. */
export class PictureSheets {
  credit = "";
  #folder;
  #index = null;
  #missing = new Set();

  static async load(folder) {
    const sheets = new PictureSheets();
    const response = await fetch(new URL("pictures.json", folder)).catch(() => null);
    if (response?.ok) {
      sheets.#index = await response.json();
      sheets.#folder = folder;
      sheets.#missing = new Set(sheets.#index.missing);
      sheets.credit = sheets.#index.credit;
    }
    return sheets;
  }

  get urls() {
    return (this.#index?.sheets ?? []).map(({ file, sha256 }) => new URL(`${file}?sha256=${sha256}`, this.#folder).href);
  }

  prefetch() {
    for (const url of this.urls) new Image().src = url;
  }

  tile(row) {
    if (!this.#index || this.#missing.has(row)) return null;
    const { columns } = this.#index;
    const inSheet = row % columns ** 2;
    const place = (n) => `${(100 * n) / (columns - 1)}%`;
    const tile = element("span", "tile");
    tile.setAttribute("aria-hidden", "true"); // the caption says what it shows
    tile.style.backgroundImage = `url("${this.urls[Math.floor(row / columns ** 2)]}")`;
    tile.style.backgroundSize = `${100 * columns}%`;
    tile.style.backgroundPosition = `${place(inSheet % columns)} ${place(Math.floor(inSheet / columns))}`;
    return tile;
  }
}
