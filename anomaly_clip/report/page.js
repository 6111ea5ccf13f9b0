"use strict";
// The category shown, and a threshold that can be moved. Scores come as sorted float32 in base 64.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const ALL = -1, FIRST = 12, BINS = 48, STEPS = 1000, WIDTH = 600, HEIGHT = 220;
  const select = byId("category");

  const decode = (text) =>
    text === undefined ? null
      : new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const categories = data.scores.map((one) => one && {
    normal: decode(one.normal), anomalous: decode(one.anomalous), all: decode(one.all),
    threshold: one.threshold ?? null,
  });
  const merged = (key) => {
    const parts = categories.filter((one) => one && one[key]).map((one) => one[key]);
    if (!parts.length) return null;
    const joined = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) { joined.set(part, at); at += part.length; }
    return joined.sort();
  };
  // How many values of a sorted array are below one.
  const below = (values, limit) => {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < limit) low = middle + 1; else high = middle;
    }
    return low;
  };
  const bestThreshold = (normal, anomalous) => {
    let best = -1, chosen = null;
    for (let i = 0; i < anomalous.length; i++) {
      if (i && anomalous[i] === anomalous[i - 1]) continue;
      const found = anomalous.length - i, wrong = normal.length - below(normal, anomalous[i]);
      const f1 = 2 * found / (found + wrong + anomalous.length);
      if (f1 > best) { best = f1; chosen = anomalous[i]; }
    }
    return chosen;
  };
  const makeAll = () => {
    const made = { normal: merged("normal"), anomalous: merged("anomalous"), all: merged("all") };
    const both = made.normal?.length && made.anomalous?.length;
    made.threshold = both ? bestThreshold(made.normal, made.anomalous) : null;
    return made;
  };
  const views = new Map();
  const view = (number) => {
    if (!views.has(number)) {
      const own = number === ALL ? makeAll() : categories[number];
      if (!own) return null;
      const filled = [own.normal, own.anomalous, own.all].filter((one) => one && one.length);
      if (!filled.length) return null;
      const low = Math.min(...filled.map((one) => one[0]));
      const high = Math.max(...filled.map((one) => one[one.length - 1]));
      // Without both classes no threshold is better than another: nothing is called anomalous.
      const start = own.threshold ?? high + (high - low || 1) * 0.01;
      views.set(number, { ...own, low, high, start, threshold: start, ruled: own.threshold !== null });
    }
    return views.get(number);
  };
  let shown = data.names.length > 1 ? ALL : 0;

  const element = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  // As few digits as tell the steps of a view apart.
  const number = (value, one) => {
    const width = one.high - one.low || 1, size = Math.max(Math.abs(one.low), Math.abs(one.high), width);
    const digits = Math.min(15, Math.max(4, Math.ceil(Math.log10(size / width)) + 4));
    return Number(value.toPrecision(digits)).toString();
  };
  // A threshold as it is shown must count as it does: more digits where scores lie close.
  const exact = (value, one) => {
    const values = [one.normal, one.anomalous, one.all].filter(Boolean);
    const counts = (limit) => values.map((scores) => below(scores, limit)).join();
    for (let digits = 4; digits < 17; digits++) {
      const shown = Number(value.toPrecision(digits));
      if (counts(shown) === counts(value)) return shown.toString();
    }
    return value.toString();
  };
  const share = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : "–");

  const drawHistogram = (one) => {
    const svg = byId("histogram"), width = one.high - one.low || 1;
    const kinds = [["normal", one.normal ?? one.all], ["anomalous", one.anomalous]];
    const binned = kinds.filter(([, values]) => values && values.length).map(([kind, values]) => {
      const counts = new Array(BINS).fill(0);
      for (const value of values) {
        counts[Math.min(BINS - 1, Math.floor((value - one.low) / width * BINS))] += 1;
      }
      return [kind, counts];
    });
    const highest = Math.max(1, ...binned.flatMap(([, counts]) => counts));
    const most = highest + (highest > 1 ? highest % 2 : 0);  // even, so that its half is whole
    const parts = [];
    for (const level of most > 1 ? [0, 0.5, 1] : [0, 1]) {
      const y = HEIGHT * (1 - level);
      parts.push(element("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
      parts.push(element("text", { x: -5, y: y + 4, "text-anchor": "end" }, most * level));
    }
    for (const [kind, counts] of binned) {
      counts.forEach((count, bin) => {
        if (!count) return;
        const height = count / most * HEIGHT;
        parts.push(element("rect", {
          class: `bar-${kind}`, x: bin * WIDTH / BINS + 0.5, width: WIDTH / BINS - 1,
          y: HEIGHT - height, height,
        }));
      });
    }
    for (const level of [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = level === 0 ? "start" : level === 1 ? "end" : "middle";
      parts.push(element("text", { x: level * WIDTH, y: HEIGHT + 16, "text-anchor": anchor },
        number(one.low + level * width, one)));
    }
    parts.push(element("text", { x: WIDTH / 2, y: HEIGHT + 33, "text-anchor": "middle" }, "image score"));
    parts.push(element("line", { class: "threshold", id: "mark", y1: -6, y2: HEIGHT }));
    svg.replaceChildren(...parts);
  };

  const showCounts = (one) => {
    const rows = [];
    const reached = (values) => values.length - below(values, one.threshold);
    if (one.all) {
      rows.push(["called anomalous", reached(one.all)], ["called normal", one.all.length - reached(one.all)]);
    } else {
      const hits = reached(one.anomalous), alarms = reached(one.normal);
      const misses = one.anomalous.length - hits;
      rows.push(
        ["hits (anomalous, found)", hits], ["misses (anomalous, not found)", misses],
        ["false alarms (normal, called anomalous)", alarms],
        ["normal, left alone", one.normal.length - alarms],
        ["found of the anomalous (recall)", share(hits, one.anomalous.length)],
        ["false alarms of the normal", share(alarms, one.normal.length)],
        ["right among alarms (precision)", share(hits, hits + alarms)],
        ["F1", share(2 * hits, 2 * hits + misses + alarms)],
      );
    }
    byId("counts").replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("tr");
      for (const text of [name, value]) {
        row.append(Object.assign(document.createElement("td"), { textContent: text }));
      }
      row.lastChild.dataset.count = name.split(" ")[0];
      return row;
    }));
  };

  const showVerdicts = () => {
    for (const figure of document.querySelectorAll(".pictures figure")) {
      const own = Number(figure.dataset.category), badge = figure.querySelector(".verdict");
      // Of all categories each has its own threshold, until the common one is moved.
      const one = view(shown === ALL && view(ALL)?.moved ? ALL : own);
      if (!one || figure.dataset.label === undefined) continue;
      const called = Math.fround(figure.dataset.score) >= one.threshold;
      const anomalous = figure.dataset.label === "1";
      badge.textContent = anomalous ? (called ? "hit" : "miss") : called ? "false alarm" : "left alone";
      badge.classList.toggle("wrong", called !== anomalous);
      badge.hidden = false;
    }
  };

  const moveTo = (one, threshold, source) => {
    one.threshold = threshold;
    one.moved = source === undefined ? one.moved : source !== "reset";
    const width = one.high - one.low || 1, place = (threshold - one.low) / width;
    if (source !== "range") byId("threshold").value = Math.round(place * STEPS);
    if (source !== "exact") byId("exact").value = exact(threshold, one);
    const x = Math.max(0, Math.min(1, place)) * WIDTH, mark = byId("mark");
    mark.setAttribute("x1", x);
    mark.setAttribute("x2", x);
    showCounts(one);
    showVerdicts();
  };

  const showScores = () => {
    const section = byId("scores"), one = section && view(shown);
    if (!section) return;
    section.hidden = !one;
    if (!one) return;
    drawHistogram(one);
    const key = (kind, count) => `<span class="key ${kind}"></span>${count.toLocaleString("en")} ${kind}`;
    byId("scores-of").innerHTML = one.all
      ? `<span class="key normal"></span>${one.all.length.toLocaleString("en")} images`
      : key("normal", one.normal.length) + key("anomalous", one.anomalous.length);
    byId("rule").textContent = (one.ruled
      ? "Begins where F1 is highest on these very images: a threshold for new images must come from others."
      : "No threshold can be chosen from images of one kind: it begins above all of them.")
      + (shown === ALL && data.names.length > 1
        ? " One threshold for all categories; pictures are judged by their category's own until it is moved." : "");
    moveTo(one, one.threshold);
  };

  const show = (chosen) => {
    shown = chosen;
    if (select) select.value = String(chosen);
    for (const row of document.querySelectorAll("#figures tbody tr")) {
      row.classList.toggle("chosen", Number(row.dataset.category) === chosen);
    }
    for (const chart of document.querySelectorAll(".chart")) {
      let any = false;
      for (const curve of chart.querySelectorAll(".curve")) {
        const own = Number(curve.dataset.category) === chosen;
        curve.classList.toggle("chosen", own);
        any ||= own;
      }
      chart.classList.toggle("narrowed", any && data.names.length > 1);
    }
    for (const kind of document.querySelectorAll(".kind")) {
      const more = kind.querySelector(".more");
      let count = 0;
      for (const figure of kind.querySelectorAll("figure")) {
        const wanted = chosen === ALL || Number(figure.dataset.category) === chosen;
        count += wanted;
        figure.hidden = !wanted || (count > FIRST && !more.dataset.pressed);
      }
      kind.hidden = !count;
      more.hidden = count <= FIRST || Boolean(more.dataset.pressed);
      more.textContent = `all ${count}`;
    }
    showScores();
  };

  select?.addEventListener("change", () => show(Number(select.value)));
  for (const row of document.querySelectorAll("#figures tbody tr")) {
    const choose = () => {
      const own = Number(row.dataset.category);
      if (data.names.length > 1) show(own === shown ? ALL : own);
    };
    row.addEventListener("click", choose);
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter") choose();
    });
  }
  for (const button of document.querySelectorAll("#figures thead button")) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.column), body = document.querySelector("#figures tbody");
      const down = button.dataset.down !== "yes";
      button.dataset.down = down ? "yes" : "";
      const value = (row) => {
        const text = row.cells[column].textContent;
        return column ? (text === "–" ? -Infinity : Number(text)) : text;
      };
      const order = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
      for (const head of document.querySelectorAll("#figures thead th")) head.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", (column === 0) === down ? "ascending" : "descending");
      const sign = (column === 0) === down ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => sign * order(a, b));
      body.append(...rows);
    });
  }
  for (const more of document.querySelectorAll(".more")) {
    more.addEventListener("click", () => { more.dataset.pressed = "yes"; show(shown); });
  }
  byId("threshold")?.addEventListener("input", (event) => {
    const one = view(shown);
    moveTo(one, one.low + event.target.value / STEPS * (one.high - one.low || 1), "range");
  });
  byId("exact")?.addEventListener("input", (event) => {
    if (Number.isFinite(event.target.valueAsNumber)) moveTo(view(shown), event.target.valueAsNumber, "exact");
  });
  byId("reset")?.addEventListener("click", () => moveTo(view(shown), view(shown).start, "reset"));
  // On paper nothing can be opened: all that the view has is shown.
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
    for (const more of document.querySelectorAll(".more")) more.dataset.pressed = "yes";
    show(shown);
  });
  show(shown);
})();
