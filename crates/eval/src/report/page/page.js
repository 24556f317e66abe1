"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const MOST = 6;
const by = id => document.getElementById(id);
const percent = (x, digits = 1) => x == null ? "–" : (100 * x).toFixed(digits);
const signed = (x, digits = 1) => (x > 0 ? "+" : "") + (100 * x).toFixed(digits);
const number = (x, digits) => x == null ? "–" : x.toFixed(digits);
const node = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const drawn = (tag, attributes = {}, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text != null) made.textContent = text;
  return made;
};
const chosen = new Set(data.rows.slice(0, 4).map(row => row.setting));
const colour = setting => `var(--s${[...chosen].indexOf(setting)})`;

const tip = by("tip");
const hover = (element, words) => {
  element.addEventListener("pointermove", event => {
    tip.textContent = words;
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  element.addEventListener("pointerleave", () => tip.style.display = "none");
};

// Theme.
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = name => document.documentElement.dataset.theme = name;
theme(new URLSearchParams(location.search).get("theme") ?? (dark.matches ? "dark" : "light"));
by("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

// Tables that can be sorted and filtered. A column has a title, a sort key and the content of a
// cell.
function table(place, rows, columns, filter) {
  const head = node("tr"), body = node("tbody");
  let order = null, down = false;
  const fill = () => {
    const wanted = filter ? filter.value.trim().toLowerCase().split(/\s+/) : [];
    let shown = rows.filter(row => wanted.every(word => row.setting.toLowerCase().includes(word)));
    if (order) {
      const value = order.value;
      shown = [...shown].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x == null || y == null) return (x == null) - (y == null);
        return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
      });
    }
    body.replaceChildren(...shown.map(row => node("tr", {}, ...columns.map(column => {
      const cell = node("td", { class: column.kind ? column.kind(row) : "" });
      cell.append(column.show(row));
      return cell;
    }))));
  };
  for (const column of columns) {
    const cell = node("th", { class: column.name ? "name" : "", title: column.title ?? "" }, column.head);
    cell.addEventListener("click", () => {
      down = order === column ? !down : !column.name;
      order = column;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill();
    });
    head.append(cell);
  }
  filter?.addEventListener("input", fill);
  fill();
  place.append(node("div", { class: "wide" }, node("table", {}, node("thead", {}, head), body)));
  return fill;
}

const span = row => data.rows.reduce((most, { difference }) => difference ? Math.max(most, -difference.low, difference.high) : most, 0.01);
function bar(row) {
  if (!row.difference) return "";
  const width = 150, height = 16, most = span();
  const x = value => width / 2 * (1 + value / most);
  const { mean, low, high } = row.difference;
  const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "interval" });
  svg.append(drawn("line", { x1: x(0), x2: x(0), y1: 0, y2: height, stroke: "var(--line)" }),
    drawn("line", { x1: x(low), x2: x(high), y1: height / 2, y2: height / 2, stroke: "currentColor", "stroke-width": 2 }),
    drawn("circle", { cx: x(mean), cy: height / 2, r: 3.5, fill: "currentColor" }));
  hover(svg, `${signed(mean)} points [${signed(low)}, ${signed(high)}] on ${row.difference.samples} samples: better on ${row.difference.better}, worse on ${row.difference.worse}`);
  return svg;
}
const verdicts = { better: "better", worse: "worse", same: "the same", unsure: "not sure" };
const verdict = row => row.difference?.verdict ?? "";
const pick = row => {
  const box = node("input", { type: "checkbox", "aria-label": `choose ${row.setting}` });
  box.checked = chosen.has(row.setting);
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(row.setting); else chosen.delete(row.setting);
    if (chosen.size > MOST) chosen.delete([...chosen][0]);
    draw();
  });
  return box;
};
const swatch = setting => chosen.has(setting) ? node("span", { class: "swatch", style: `background:${colour(setting)}` }) : "";
const named = { head: "setting", name: true, value: row => row.setting, kind: () => "name", show: row => node("span", {}, swatch(row.setting), row.setting) };
const main = [
  { head: "", value: row => chosen.has(row.setting) ? 1 : 0, show: pick }, named,
  { head: "score, %", value: row => row.score.mean, show: row => percent(row.score.mean) },
  { head: "95 %", value: row => row.score.low, show: row => `${percent(row.score.low)} – ${percent(row.score.high)}` },
  { head: "difference", value: row => row.difference?.mean, kind: verdict, show: row => row.difference ? signed(row.difference.mean) : "–" },
  { head: "its interval", value: row => row.difference?.low, kind: verdict, show: bar },
  { head: "than dense", value: verdict, kind: verdict, show: row => verdicts[verdict(row)] ?? "–" },
  { head: "dense / held", value: row => row.ratio, show: row => number(row.ratio, 2) },
  { head: "held, MB", value: row => row.kv_bytes, show: row => number(row.kv_bytes == null ? null : row.kv_bytes / 1e6, 2) },
  { head: "first token, s", value: row => row.first_token_seconds, show: row => number(row.first_token_seconds, 2) },
  { head: "decode, tokens/s", value: row => row.decode?.tokens_per_second, show: row => number(row.decode?.tokens_per_second, 1) + (row.decode?.batch > 1 ? ` (${row.decode.batch})` : "") },
  { head: "samples", value: row => row.samples, show: row => row.samples },
];
const fills = [table(by("main"), data.rows, main, by("filter"))];
const scored = names => [named, ...names.map(([key, words]) => ({
  head: words, value: row => row.scores[key]?.mean, show: row => {
    const own = row.scores[key];
    const cell = node("span", {}, percent(own?.mean));
    if (own) hover(cell, `${percent(own.mean)} % [${percent(own.low)}, ${percent(own.high)}], ${own.samples} samples`);
    return cell;
  } }))];
fills.push(table(by("categories"), data.rows, scored(data.categories), by("filter")));
fills.push(table(by("tasks"), data.rows, scored(data.tasks.map(task => [task, task])), by("filter")));
if (data.agreement.length) {
  by("agreement").hidden = false;
  fills.push(table(by("agreements"), data.agreement, [named,
    { head: "text", name: true, kind: () => "name", value: row => row.text, show: row => row.text },
    { head: "dense / held", value: row => row.ratio, show: row => number(row.ratio, 2) },
    { head: "KL, nats", value: row => row.kl, show: row => number(row.kl, 4) },
    { head: "top-1, %", value: row => row.top1, show: row => percent(row.top1) },
    { head: "perplexity", value: row => row.perplexity, show: row => number(row.perplexity, 2) },
    { head: "dense", value: row => row.dense_perplexity, show: row => number(row.dense_perplexity, 2) },
    { head: "tokens", value: row => row.tokens, show: row => row.tokens }], by("filter")));
}

// Plots points against bytes, with the Pareto front.
function scatter(place, points, { words, better, log }) {
  place.replaceChildren();
  if (points.length < 2) { place.append(node("p", { class: "note" }, "Fewer than two settings report their bytes.")); return; }
  const [width, height, left, right, top, bottom] = [1080, 460, 56, 30, 16, 46];
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
  const least = Math.min(...points.map(point => point.x)), widest = Math.max(...points.map(point => point.x), least * 1.1);
  const values = points.flatMap(point => log ? [Math.max(point.y, 1e-4)] : [point.low ?? point.y, point.high ?? point.y]);
  const along = value => log ? Math.log10(Math.max(value, 1e-4)) : value;
  let [floor, ceiling] = [Math.min(...values.map(along)), Math.max(...values.map(along))];
  const margin = 0.06 * (ceiling - floor || 1); floor -= margin; ceiling += margin;
  if (!log) floor = Math.max(0, floor);
  const x = value => left + (width - left - right) * Math.log(value / (least / 1.06)) / Math.log(widest * 1.12 / (least / 1.06));
  const y = value => height - bottom - (height - top - bottom) * (along(value) - floor) / (ceiling - floor);
  const step = [1, 2, 5, 10, 20, 50].map(n => n / 100).find(s => (ceiling - floor) / s <= 8) ?? 0.5;
  const marks = log ? [1e-4, 1e-3, 1e-2, 0.1, 1, 10] : Array.from({ length: 200 }, (_, i) => i * step);
  for (const mark of marks.filter(mark => along(mark) >= floor && along(mark) <= ceiling)) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(mark), y2: y(mark), stroke: "var(--line)" }),
      drawn("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end", class: "soft" }, log ? mark : (100 * mark).toFixed(0)));
  }
  for (const mark of [0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64].filter(mark => mark >= least / 1.05 && mark <= widest * 1.1)) {
    svg.append(drawn("text", { x: x(mark), y: height - bottom + 18, "text-anchor": "middle", class: "soft" }, mark + "x"));
  }
  svg.append(drawn("text", { x: width - right, y: height - 8, "text-anchor": "end", class: "soft" }, "dense bytes / bytes held →"),
    drawn("text", { x: left, y: top - 3, class: "soft" }, words));
  const beats = (a, b) => better > 0 ? a.y > b.y : a.y < b.y;
  const front = points.filter(point => !points.some(other => other !== point && other.x >= point.x && (beats(other, point) || other.y === point.y) && (other.x > point.x || beats(other, point))))
    .sort((a, b) => a.x - b.x);
  svg.append(drawn("polyline", { points: front.map(point => `${x(point.x)},${y(point.y)}`).join(" "), fill: "none", stroke: "var(--ink)", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
  const labels = [];
  const important = [...points].sort((a, b) => front.includes(a) - front.includes(b) || chosen.has(a.setting) - chosen.has(b.setting));
  for (const point of important) {
    const own = chosen.has(point.setting), ahead = front.includes(point);
    const fill = own ? colour(point.setting) : ahead ? "var(--ink)" : "var(--soft)";
    if (point.low != null && (own || ahead)) svg.append(drawn("line", { x1: x(point.x), x2: x(point.x), y1: y(point.low), y2: y(point.high), stroke: fill, opacity: 0.5 }));
    const dot = drawn("circle", { cx: x(point.x), cy: y(point.y), r: own || ahead ? 6 : 4, fill, opacity: own || ahead ? 1 : 0.55 });
    hover(dot, point.words);
    svg.append(dot);
  }
  // Labels of important points, if there is room.
  for (const point of important.filter(point => front.includes(point) || chosen.has(point.setting)).reverse()) {
    const wide = 6.6 * point.setting.length, [px, py] = [x(point.x), y(point.y)];
    const places = [[px + 9, py + 4], [px - 9 - wide, py + 4], [px + 9, py - 9], [px + 9, py + 17], [px - 9 - wide, py - 9], [px - 9 - wide, py + 17]];
    const clear = ([lx, ly]) => lx > left && lx + wide < width - 2 && ly > 14 && ly < height - bottom &&
      labels.every(([ox, oy, ow]) => lx + wide < ox || ox + ow < lx || Math.abs(ly - oy) > 13) &&
      points.every(other => other === point || x(other.x) < lx - 5 || x(other.x) > lx + wide + 5 || Math.abs(y(other.y) - (ly - 4)) > 10);
    const found = places.find(clear);
    if (!found) continue;
    labels.push([...found, wide]);
    svg.append(drawn("text", { x: found[0], y: found[1] }, point.setting));
  }
  place.append(svg);
}

function maps(place) {
  place.replaceChildren();
  for (const map of data.maps.filter(map => chosen.has(map.setting))) {
    const cells = node("div", { class: "cells", style: `grid-template-columns:max-content repeat(${map.columns.length},minmax(3.4em,max-content))` });
    cells.append(node("div", { class: "head" }, ""), ...map.columns.map(words => node("div", { class: "head" }, words)));
    map.rows.forEach((words, i) => {
      cells.append(node("div", { class: "rowhead" }, words), ...map.cells[i].map((cell, j) => {
        if (cell == null) return node("div", {}, "");
        const share = cell[0], shade = `color-mix(in srgb, rgb(var(--high)) ${Math.round(100 * share)}%, rgb(var(--low)))`;
        const made = node("div", { style: `background:${shade};color:${share > 0.5 ? "var(--paper)" : "var(--ink)"}` }, percent(share, 0));
        hover(made, `${map.setting}: ${words}, ${map.columns[j]}: ${percent(share)} % of ${cell[1]} samples`);
        return made;
      }));
    });
    place.append(node("div", {}, node("h3", {}, swatch(map.setting), `${map.setting} – ${map.title}`), cells));
  }
  by("maps-part").hidden = !data.maps.length;
}

function radar(place) {
  place.replaceChildren();
  const axes = data.categories, shown = data.rows.filter(row => chosen.has(row.setting));
  by("radar-part").hidden = axes.length < 3;
  if (axes.length < 3) return;
  const [width, height, radius] = [760, 420, 150], [cx, cy] = [width / 2, height / 2];
  const best = axes.map(([key]) => Math.max(...data.rows.map(row => row.scores[key]?.mean ?? 0), 1e-9));
  const at = (i, share) => [cx + radius * share * Math.sin(2 * Math.PI * i / axes.length), cy - radius * share * Math.cos(2 * Math.PI * i / axes.length)];
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "score by category" });
  for (const share of [0.25, 0.5, 0.75, 1]) svg.append(drawn("polygon", { points: axes.map((_, i) => at(i, share).join()).join(" "), fill: "none", stroke: "var(--line)" }));
  axes.forEach(([, words], i) => {
    const [x, y] = at(i, 1.1), anchor = Math.abs(x - cx) < 20 ? "middle" : x < cx ? "end" : "start";
    svg.append(drawn("text", { x, y: y + 4, "text-anchor": anchor, class: "soft" }, `${words} (${percent(best[i], 0)} %)`));
  });
  for (const row of shown) {
    const points = axes.map(([key], i) => at(i, (row.scores[key]?.mean ?? 0) / best[i]).join()).join(" ");
    const shape = drawn("polygon", { points, fill: "none", stroke: colour(row.setting), "stroke-width": 2 });
    hover(shape, row.setting);
    svg.append(shape);
  }
  place.append(svg, legend(shown));
}
const legend = rows => node("div", { class: "tools" }, ...rows.map(row => node("span", {}, swatch(row.setting), row.setting)));

function quarters(place) {
  place.replaceChildren();
  const all = data.rows.filter(row => row.quarters), shown = all.filter(row => chosen.has(row.setting));
  by("quarters-part").hidden = !all.length;
  const [width, height, left, bottom] = [620, 260, 46, 34];
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "score by position", style: "max-width:760px" });
  const x = i => left + 20 + i * (width - left - 60) / 3, y = share => 14 + (height - 14 - bottom) * (1 - share);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) svg.append(drawn("line", { x1: left, x2: width - 10, y1: y(share), y2: y(share), stroke: "var(--line)" }), drawn("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end", class: "soft" }, percent(share, 0)));
  ["first quarter", "second", "third", "last"].forEach((words, i) => svg.append(drawn("text", { x: x(i), y: height - 10, "text-anchor": "middle", class: "soft" }, words)));
  for (const row of shown) {
    const line = drawn("polyline", { points: row.quarters.map((share, i) => `${x(i)},${y(share)}`).join(" "), fill: "none", stroke: colour(row.setting), "stroke-width": 2.5 });
    hover(line, `${row.setting}: ${row.quarters.map(share => percent(share, 0)).join(", ")} %`);
    svg.append(line);
  }
  place.append(svg, legend(shown));
}

function draw() {
  fills.forEach(fill => fill());
  scatter(by("scatter"), data.rows.filter(row => row.ratio).map(row => ({ setting: row.setting, x: row.ratio, y: row.score.mean, low: row.score.low, high: row.score.high,
    words: `${row.setting}: ${percent(row.score.mean)} % [${percent(row.score.low)}, ${percent(row.score.high)}] at ${number(row.ratio, 2)}x` })), { words: "score, %", better: 1 });
  const first = data.agreement[0]?.text, own = data.agreement.filter(row => row.text === first && row.ratio);
  by("divergence-part").hidden = own.length < 2;
  if (own.length >= 2) scatter(by("divergence"), own.map(row => ({ setting: row.setting, x: row.ratio, y: row.kl, words: `${row.setting}: ${number(row.kl, 4)} nats at ${number(row.ratio, 2)}x` })), { words: "divergence, nats", better: -1, log: true });
  maps(by("maps"));
  radar(by("radar"));
  quarters(by("quarters"));
}
draw();
