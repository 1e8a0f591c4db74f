"use strict";

const read = (element) => JSON.parse(element.textContent);
const make = (name, className, text) => Object.assign(document.createElement(name), { className, textContent: text });

// ---- figures ------------------------------------------------------------------------------------------------------------

const plots = [...document.querySelectorAll(".figure")].map((figure) => {
  const { data, layout } = read(figure.querySelector("script"));
  const plot = figure.appendChild(make("div", "", ""));
  Plotly.newPlot(plot, data, layout, {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  });
  return plot;
});

// Paper is narrower than a window, and nothing is resized for it by itself.
addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: 680 })));
addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));

// ---- places -------------------------------------------------------------------------------------------------------------

const placeLayer = document.getElementById("place-layer");
if (placeLayer) {
  const show = () =>
    document.querySelectorAll(".places").forEach((table, i) => (table.hidden = i !== placeLayer.selectedIndex));
  placeLayer.addEventListener("change", show);
  show();
}

// ---- text ---------------------------------------------------------------------------------------------------------------

const embedded = document.getElementById("positions");
if (embedded) {
  const { layers, columns, documents } = read(embedded);
  const [box, column, slider, shown, legend, panel] = ["documents", "column", "layer", "shown", "legend", "numbers"].map(
    (id) => document.getElementById(id)
  );
  const tokens = []; // { element, document, i }, in the order of the page
  let chosen = null;

  const series = (doc, { name, layered }, layer) => (layered ? doc.values[name][layer] : doc.values[name]);
  const said = (value) => (value === null ? "–" : String(value));

  for (const doc of documents) {
    const article = box.appendChild(make("article", "document", ""));
    article.append(make("h3", "", doc.title));
    const paragraph = article.appendChild(make("p", "", ""));
    doc.text.forEach((text, i) => {
      if (doc.position[i] !== (i ? doc.position[i - 1] + 1 : 0)) paragraph.append(make("span", "gap", "…"));
      const element = paragraph.appendChild(make("i", "", text.replaceAll("\n", "↵\n")));
      element.token = tokens.push({ element, document: doc, i }) - 1;
    });
    if (doc.rows > doc.text.length) paragraph.append(make("span", "gap", `… ${doc.rows - doc.text.length} more`));
  }

  // From the least value to the 99th percentile, by the square root: most positions have little, a few have much.
  function shade() {
    const by = columns[column.value];
    const layer = Number(slider.value);
    shown.textContent = layers[layer];
    const values = tokens.map(({ document, i }) => series(document, by, layer)[i]);
    const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
    const high = sorted[Math.floor(0.99 * (sorted.length - 1))];
    const low = sorted[0] < high / 1000 ? 0 : sorted[0];
    const colour = (share) => `rgba(213, 94, 0, ${(0.75 * Math.sqrt(share)).toFixed(3)})`;
    tokens.forEach(({ element }, t) => {
      const value = values[t];
      const share = value === null ? 0 : high > low ? Math.min(1, (value - low) / (high - low)) : 0;
      element.style.background = share ? colour(share) : "";
    });
    const marks = [0, 0.0625, 0.25, 0.5625, 1].map((share) => {
      const mark = make("span", "", `${share === 1 ? "≥ " : ""}${Number((low + share * (high - low)).toPrecision(2))}`);
      mark.style.background = colour(share);
      return mark;
    });
    legend.replaceChildren(...(sorted.length ? marks : []));
    if (chosen !== null) tell();
  }

  function choose(token) {
    if (chosen !== null) tokens[chosen].element.classList.remove("chosen");
    chosen = token;
    tokens[chosen].element.classList.add("chosen");
    tell();
  }

  function tell() {
    const { document: doc, i } = tokens[chosen];
    const layer = Number(slider.value);
    const by = columns[column.value];
    const table = make("table", "", "");
    const rows = [["position", doc.position[i], ""]].concat(
      columns.map((each) => [each.label, said(series(doc, each, layer)[i]), each === by ? "by" : ""])
    );
    for (const [label, value, mark] of rows) {
      const row = table.insertRow();
      row.append(make("th", mark, label), make("td", `number ${mark}`, value));
    }
    panel.replaceChildren(make("span", "token", doc.text[i]), make("span", "", ` at layer ${layers[layer]}`), table);
    if (by.layered && layers.length > 1) panel.append(make("p", "", `${by.label}, in units of each layer's mean`), profile(doc, by, i, layer));
  }

  // One token's number at every layer over the mean of all that is shown there; the dashes are at 1.
  function profile(doc, by, i, layer) {
    const values = layers.map((_, l) => {
      const all = documents.flatMap((each) => each.values[by.name][l]);
      return (doc.values[by.name][l][i] ?? 0) / (all.reduce((sum, value) => sum + value, 0) / all.length || 1);
    });
    const height = (value) => 70 - (62 * value) / Math.max(2, ...values);
    const at = values.map((value, l) => [(200 * l) / (layers.length - 1), height(value)]);
    const picture = make("div", "", "");
    picture.innerHTML =
      `<svg viewBox="-4 0 208 92" role="img" aria-label="over layers"><path d="M0 70H200" stroke="#9aa5b1"/>` +
      `<path d="M0 ${height(1)}H200" stroke="#9aa5b1" stroke-dasharray="4"/>` +
      `<polyline points="${at.join(" ")}" fill="none" stroke="#0072b2" stroke-width="2"/>` +
      `<circle cx="${at[layer][0]}" cy="${at[layer][1]}" r="4" fill="#d55e00"/>` +
      `<text x="0" y="86" font-size="11">layer ${layers[0]}</text>` +
      `<text x="200" y="86" font-size="11" text-anchor="end">${layers.at(-1)}</text></svg>`;
    return picture.firstChild;
  }

  box.addEventListener("mouseover", ({ target }) => target.token !== undefined && choose(target.token));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choose(chosen === null ? 0 : Math.min(tokens.length - 1, Math.max(0, chosen + step)));
    tokens[chosen].element.scrollIntoView({ block: "nearest" });
  });
  column.addEventListener("change", shade);
  slider.addEventListener("input", shade);
  shade();
}
