"use strict";
// Category selection and movable threshold. Scores are embedded as sorted floats in base 64.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const ALL = -1, FIRST = 12, BINS = 48, STEPS = 1000, WIDTH = 600, HEIGHT = 220;
  const select = byId("category");

  const decode = (text, isDouble) => {
    if (text === undefined) return null;
    const { buffer } = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return isDouble ? new Float64Array(buffer) : new Float32Array(buffer);
  };
  const categories = data.scores.map((entry) => entry && {
    ...Object.fromEntries(["normal", "anomalous", "all"].map((key) => [key, decode(entry[key], entry.double)])),
    calibrated: entry.calibrated, threshold: entry.calibrated ?? entry.threshold ?? null, double: entry.double,
  });
  const scored = categories.filter(Boolean);
  const isCalibrated = scored.some((entry) => entry.calibrated !== null);
  const merged = (key) => {
    const parts = scored.filter((entry) => entry[key]).map((entry) => entry[key]);
    if (!parts.length) return null;
    const joined = new Float64Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) { joined.set(part, at); at += part.length; }
    return joined.sort();
  };
  // Number of values in a sorted array that are below a limit.
  const below = (values, limit) => {
    let low = 0, high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < limit) low = middle + 1; else high = middle;
    }
    return low;
  };
  // Number of values above a calibrated threshold, or otherwise at or above a threshold.
  const reached = (values, limit) => {
    if (!isCalibrated) return values.length - below(values, limit);
    let low = below(values, limit);
    while (values[low] === limit) low += 1;
    return values.length - low;
  };
  const bestThreshold = (normal, anomalous) => {
    let best = -1, threshold = null;
    for (let i = 0; i < anomalous.length; i++) {
      if (i && anomalous[i] === anomalous[i - 1]) continue;
      const hits = anomalous.length - i, falseAlarms = normal.length - below(normal, anomalous[i]);
      const f1 = 2 * hits / (hits + falseAlarms + anomalous.length);
      if (f1 > best) { best = f1; threshold = anomalous[i]; }
    }
    return threshold;
  };
  const makeAll = () => {
    const all = { normal: merged("normal"), anomalous: merged("anomalous"), all: merged("all"), calibrated: null };
    // Thresholds of several calibrations have no common value: each category keeps its own.
    const both = !isCalibrated && all.normal?.length && all.anomalous?.length;
    all.threshold = both ? bestThreshold(all.normal, all.anomalous) : null;
    all.hasOwn = isCalibrated;
    return all;
  };
  const views = new Map();
  const view = (number) => {
    if (!views.has(number)) {
      const entry = number === ALL ? makeAll() : categories[number];
      if (!entry) return null;
      const filled = [entry.normal, entry.anomalous, entry.all].filter((scores) => scores && scores.length);
      if (!filled.length) return null;
      const marks = number === ALL ? scored : [entry];
      const limits = marks.map((part) => part.calibrated).filter((limit) => limit !== null);
      // The start is null if nothing gives a threshold: then the slider has to be moved first.
      views.set(number, {
        ...entry, start: entry.threshold, limits,
        low: Math.min(...filled.map((scores) => scores[0]), ...limits),
        high: Math.max(...filled.map((scores) => scores[scores.length - 1]), ...limits),
      });
    }
    return views.get(number);
  };
  let shown = data.names.length > 1 ? ALL : 0;

  const element = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  // Formats a value with the fewest digits that distinguish the steps of a view.
  const number = (value, current) => {
    const width = current.high - current.low || 1;
    const size = Math.max(Math.abs(current.low), Math.abs(current.high), width);
    const digits = Math.min(15, Math.max(4, Math.ceil(Math.log10(size / width)) + 4));
    return Number(value.toPrecision(digits)).toString();
  };
  // Formats a threshold with the fewest digits that give the same counts as the exact value.
  const exact = (value, current) => {
    const values = [current.normal, current.anomalous, current.all].filter(Boolean);
    const counts = (limit) => values.map((scores) => reached(scores, limit)).join();
    for (let digits = 4; digits < 17; digits++) {
      const shown = Number(value.toPrecision(digits));
      if (counts(shown) === counts(value)) return shown.toString();
    }
    return value.toString();
  };
  const fraction = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : "–");

  const drawHistogram = (current) => {
    const svg = byId("histogram"), width = current.high - current.low || 1;
    const kinds = [["normal", current.normal ?? current.all], ["anomalous", current.anomalous]];
    const binned = kinds.filter(([, values]) => values && values.length).map(([kind, values]) => {
      const counts = new Array(BINS).fill(0);
      for (const value of values) {
        counts[Math.min(BINS - 1, Math.floor((value - current.low) / width * BINS))] += 1;
      }
      return [kind, counts];
    });
    const highest = Math.max(1, ...binned.flatMap(([, counts]) => counts));
    const most = highest + (highest > 1 ? highest % 2 : 0);  // even, so that half of it is an integer
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
        number(current.low + level * width, current)));
    }
    parts.push(element("text", { x: WIDTH / 2, y: HEIGHT + 33, "text-anchor": "middle" }, "image score"));
    for (const limit of current.limits) {
      const x = (limit - current.low) / width * WIDTH;
      parts.push(element("line", { class: "calibrated", x1: x, x2: x, y1: -6, y2: HEIGHT }));
      if (current.limits.length > 1) continue;
      const isRight = x > WIDTH / 2;
      parts.push(element("text", { class: "calibrated-name", x: isRight ? x - 6 : x + 6, y: 5, "text-anchor": isRight ? "end" : "start" },
        `calibrated threshold ${number(limit, current)}`));
    }
    parts.push(element("line", { class: "threshold", id: "mark", y1: -6, y2: HEIGHT }));
    svg.replaceChildren(...parts);
  };

  // Images of a kind that reach the threshold, or that of their category until it is moved.
  const count = (current, key) => {
    if (current.threshold !== null) return reached(current[key], current.threshold);
    return scored.reduce((sum, entry) => sum + (entry[key] ? reached(entry[key], entry.threshold) : 0), 0);
  };
  const showCounts = (current) => {
    const rows = [];
    const hasThreshold = current.threshold !== null || current.hasOwn;
    if (hasThreshold && current.all) {
      const above = count(current, "all");
      const names = isCalibrated ? ["above the threshold", "not above it"] : ["at or above the threshold", "below it"];
      rows.push([names[0], above], [names[1], current.all.length - above]);
    } else if (hasThreshold) {
      const hits = count(current, "anomalous"), alarms = count(current, "normal");
      const misses = current.anomalous.length - hits;
      rows.push(
        ["true positives (detected anomalies)", hits], ["false negatives (missed anomalies)", misses],
        ["false positives (false alarms)", alarms], ["true negatives", current.normal.length - alarms],
        ["recall (true positive rate)", fraction(hits, current.anomalous.length)],
        ["false positive rate", fraction(alarms, current.normal.length)],
        ["precision", fraction(hits, hits + alarms)],
        ["F1", fraction(2 * hits, 2 * hits + misses + alarms)],
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
    for (const card of document.querySelectorAll("#gallery .card")) {
      const category = Number(card.dataset.category), badge = card.querySelector(".verdict");
      // When all categories are shown, each uses its own threshold until the common one is moved.
      const current = view(shown === ALL && view(ALL)?.moved ? ALL : category);
      if (!current || card.dataset.label === undefined) continue;
      badge.hidden = current.threshold === null;
      card.querySelector(".badge")?.toggleAttribute("hidden", !badge.hidden);
      if (badge.hidden) continue;
      const score = current.double || shown === ALL ? Number(card.dataset.score) : Math.fround(card.dataset.score);
      const predicted = current.moved || card.dataset.decision === undefined
        ? reached([score], current.threshold) === 1 : card.dataset.decision === "anomalous";
      const anomalous = card.dataset.label === "1";
      const correct = predicted === anomalous;
      badge.textContent = `${correct ? "true" : "false"} ${predicted ? "positive" : "negative"}`;
      badge.classList.toggle("wrong", !correct);
    }
  };

  const moveTo = (current, threshold, source) => {
    current.threshold = threshold;
    current.moved = source === undefined ? current.moved : source !== "reset";
    const isSet = threshold !== null, width = current.high - current.low || 1;
    const position = isSet ? (threshold - current.low) / width : 1;
    if (source !== "range") byId("threshold").value = Math.round(position * STEPS);
    if (source !== "exact") byId("exact").value = isSet ? exact(threshold, current) : "";
    const x = Math.max(0, Math.min(1, position)) * WIDTH, mark = byId("mark");
    mark.setAttribute("x1", x);
    mark.setAttribute("x2", x);
    mark.toggleAttribute("hidden", !isSet);
    showCounts(current);
    showVerdicts();
  };

  const rule = (current) => {
    const isMerged = shown === ALL && data.names.length > 1;
    if (isCalibrated) {
      const text = isMerged
        ? "Each category has a calibrated threshold (the lines in the histogram), and the counts use them until the slider is moved."
        : "An image is anomalous if its score is above the calibrated threshold.";
      return `${text} Moving the slider changes no decision.`
        + (data.fdr === null ? "" : " The decisions are also corrected for the number of images, so these counts may differ.");
    }
    if (current.start === null) {
      return current.all
        ? "This slider decides nothing: without a calibration there is no threshold. Move it to count the images at or above a score."
        : "No threshold can be chosen from images of one class only. Move the slider to count the images at or above a score.";
    }
    return "The initial threshold maximises F1 on these images. "
      + (data.transductive
        ? "No threshold holds for other images, as scores depend on the images that are scored together."
        : "Choose the threshold for new images on separate data.")
      + (isMerged ? " This threshold applies to all categories. Until it is moved, the images below are classified with the threshold of their own category." : "");
  };

  const showScores = () => {
    const section = byId("scores"), current = section && view(shown);
    if (!section) return;
    section.hidden = !current;
    if (!current) return;
    drawHistogram(current);
    const key = (kind, count) => `<span class="key ${kind}"></span>${count.toLocaleString("en")} ${kind}`;
    byId("scores-of").innerHTML = current.all
      ? `<span class="key normal"></span>${current.all.length.toLocaleString("en")} images`
      : key("normal", current.normal.length) + key("anomalous", current.anomalous.length);
    byId("rule").textContent = rule(current);
    moveTo(current, current.threshold);
  };

  const show = (chosen) => {
    shown = chosen;
    if (select) select.value = String(chosen);
    for (const row of document.querySelectorAll("#metrics tbody tr")) {
      row.classList.toggle("chosen", Number(row.dataset.category) === chosen);
    }
    for (const row of document.querySelectorAll("#kinds tbody tr")) {
      row.hidden = chosen !== ALL && Number(row.dataset.of) !== chosen;
    }
    for (const button of document.querySelectorAll(".legend button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.category) === chosen));
    }
    for (const chart of document.querySelectorAll(".chart")) {
      let any = false;
      for (const curve of chart.querySelectorAll(".curve")) {
        const matches = Number(curve.dataset.category) === chosen;
        curve.classList.toggle("chosen", matches);
        any ||= matches;
      }
      chart.classList.toggle("narrowed", any && data.names.length > 1);
    }
    for (const kind of document.querySelectorAll(".kind")) {
      const more = kind.querySelector(".more");
      let count = 0;
      for (const card of kind.querySelectorAll(".card")) {
        const matches = chosen === ALL || Number(card.dataset.category) === chosen;
        count += matches;
        card.hidden = !matches || (count > FIRST && !more.dataset.pressed);
      }
      kind.hidden = !count;
      more.hidden = count <= FIRST || Boolean(more.dataset.pressed);
      more.textContent = `show all ${count}`;
    }
    showScores();
    document.dispatchEvent(new CustomEvent("category", { detail: data.names.length > 1 ? chosen : ALL }));
  };

  const panels = byId("all-panels");
  if (panels) panels.parentElement.hidden = false;  // without a script, they stay hidden
  panels?.addEventListener("change", () => document.body.classList.toggle("panels", panels.checked));
  select?.addEventListener("change", () => show(Number(select.value)));
  for (const row of document.querySelectorAll("#metrics tbody tr")) {
    const choose = () => {
      const category = Number(row.dataset.category);
      if (data.names.length > 1) show(category === shown ? ALL : category);
    };
    row.addEventListener("click", choose);
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter") choose();
    });
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const category = Number(button.dataset.category);
      show(category === shown ? ALL : category);
    });
  }
  for (const button of document.querySelectorAll("#metrics thead button")) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.column), body = document.querySelector("#metrics tbody");
      const down = button.dataset.down !== "yes";
      button.dataset.down = down ? "yes" : "";
      const value = (row) => {
        const text = row.cells[column].firstChild.textContent;  // without the interval
        return column ? (text === "–" ? -Infinity : Number(text)) : text;
      };
      const order = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
      for (const head of document.querySelectorAll("#metrics thead th")) head.removeAttribute("aria-sort");
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
    const current = view(shown);
    moveTo(current, current.low + event.target.value / STEPS * (current.high - current.low || 1), "range");
  });
  byId("exact")?.addEventListener("input", (event) => {
    if (Number.isFinite(event.target.valueAsNumber)) moveTo(view(shown), event.target.valueAsNumber, "exact");
  });
  byId("reset")?.addEventListener("click", () => moveTo(view(shown), view(shown).start, "reset"));
  // Nothing can be expanded on paper, so expand everything before printing.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const more of document.querySelectorAll(".more")) more.dataset.pressed = "yes";
    show(shown);
  });
  show(shown);
})();
