"use strict";
// Table of all images: sorting, filters, and the gallery image of a row below it.
(() => {
  const FIRST = 25, MORE = 200, ALL = -1;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("rows").textContent);
  const { names } = JSON.parse(byId("data").textContent);
  const table = byId("image-table"), body = table.tBodies[0], more = byId("more-rows");
  const only = byId("only-anomalous"), search = byId("name-filter");
  const keys = [...table.querySelectorAll("thead button")].map((button) => button.dataset.key);
  const floats = (text) =>
    text && new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const columns = {
    ...data, scores: floats(data.scores), p_values: floats(data.p_values),
    categories: data.categories.map((category) => names[category] ?? ""),
  };
  const ANOMALOUS = "1", WORDS = { 0: "normal", 1: "anomalous" };
  const isUnreadable = (row) => row in data.errors;
  const collator = new Intl.Collator("en", { numeric: true });
  let category = ALL, length = FIRST, sorted = null, rows = [];

  const text = (key, row) => {
    const value = columns[key][row];
    if (key === "decisions" || key === "labels") return WORDS[value] ?? "–";
    if (key === "scores") return Number.isNaN(value) ? "–" : Number(value.toPrecision(5)).toString();
    if (key === "p_values") return Number.isNaN(value) ? "–" : Number(value.toPrecision(3)).toString();
    return value || "–";
  };
  // Numbers and decisions begin with the most anomalous, words with A; unknown values come last.
  const firstDown = (key) => ["scores", "decisions", "labels"].includes(key);
  const isUnknown = (key, row) => {
    const value = columns[key][row];
    return value === "-" || value === "" || Number.isNaN(value);
  };
  const compare = (key, a, b) => {
    const one = columns[key][a], other = columns[key][b];
    return typeof one === "number" ? one - other : collator.compare(one, other);
  };
  const sort = (key, down) => {
    sorted = { key, down };
    const order = data.names.map((_, row) => row);
    order.sort((a, b) => {
      const unknown = isUnknown(key, a) - isUnknown(key, b);
      if (unknown) return unknown;
      const difference = isUnknown(key, a) ? 0 : compare(key, a, b);
      if (difference) return down ? -difference : difference;
      const tie = columns.scores[b] - columns.scores[a];  // NaN of unreadable images keeps the order
      return tie || a - b;
    });
    sorted.order = order;
    for (const button of table.querySelectorAll("thead button")) {
      const head = button.parentElement;
      if (button.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    show();
  };
  const show = () => {
    const words = (search.value || "").toLowerCase();
    const inView = (row) => (category === ALL || data.categories[row] === category)
      && (!words || data.names[row].toLowerCase().includes(words));
    const matching = sorted.order.filter(inView);
    rows = only?.checked ? matching.filter((row) => data.decisions[row] === ANOMALOUS) : matching;
    const visible = rows.slice(0, length);
    body.replaceChildren(...visible.map(makeRow));
    const rest = rows.length - visible.length;
    more.hidden = rest <= 0;
    more.textContent = `show ${Math.min(MORE, rest).toLocaleString("en")} more`;
    const unreadable = matching.filter(isUnreadable).length;
    byId("num-rows").textContent = `${visible.length.toLocaleString("en")} of `
      + `${rows.length.toLocaleString("en")} shown`
      + (unreadable ? `; ${unreadable.toLocaleString("en")} unreadable` : "");
  };
  // Long names break at their separators.
  const breakable = (node) => {
    const parts = node.textContent.split(/(?<=[\/_\-])/);
    node.replaceChildren(...parts.flatMap((part, n) => (n ? [document.createElement("wbr"), part] : [part])));
  };
  const makeRow = (row) => {
    const line = document.createElement("tr");
    line.dataset.row = row;
    for (const key of keys) {
      if (isUnreadable(row) && key === "p_values") continue;  // the reason needs the space
      const cell = line.insertCell(), content = text(key, row);
      if (key === "names" && row in data.cards) {
        const button = Object.assign(document.createElement("button"), { type: "button", textContent: content });
        button.setAttribute("aria-expanded", "false");
        breakable(button);
        cell.append(button);
        line.dataset.card = data.cards[row];
      } else if (key === "names" && row in data.drawings) {
        const link = Object.assign(document.createElement("a"), { href: data.drawings[row], textContent: content });
        breakable(link);
        cell.append(link);
      } else if (key === "decisions" && WORDS[columns[key][row]]) {
        cell.append(Object.assign(document.createElement("span"), { className: `badge ${content}`, textContent: content }));
      } else if (key === "scores" && isUnreadable(row)) {
        cell.className = "error";
        cell.colSpan = keys.includes("p_values") ? 2 : 1;
        cell.textContent = data.errors[row];
      } else {
        cell.textContent = content;
        if (key === "names") breakable(cell);
      }
      cell.dataset.key = key;
    }
    return line;
  };
  const toggle = (line) => {
    const button = line.querySelector("button");
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) { line.nextElementSibling.remove(); return; }
    const detail = document.createElement("tr"), cell = detail.insertCell();
    detail.className = "detail";
    cell.colSpan = keys.length;
    const card = byId(`card-${line.dataset.card}`).cloneNode(true);
    card.removeAttribute("id");
    card.hidden = false;
    cell.append(card);
    line.after(detail);
  };
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-card]");
    if (line && !getSelection().toString()) toggle(line);
  });
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const { key } = button.dataset;
      sort(key, sorted.key === key ? !sorted.down : firstDown(key));
    });
  }
  const restart = () => { length = FIRST; show(); };
  only?.addEventListener("change", restart);
  search.addEventListener("input", restart);
  more.addEventListener("click", () => {
    const next = rows[length];
    length += MORE;
    show();
    body.querySelector(`tr[data-row="${next}"] button`)?.focus();
  });
  document.addEventListener("category", (event) => { category = event.detail; restart(); });
  // p-values of several categories are comparable, scores are not.
  if (columns.p_values && names.length > 1) sort("p_values", false); else sort("scores", true);
})();
