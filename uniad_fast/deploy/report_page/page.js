"use strict";
// Rows of the data: name, class, kind, defective (1, 0, or -1 where nobody said), score, recognized class, width, height,
// regions as shares of the image, thumbnail, map.
const DATA = JSON.parse(document.getElementById("data").textContent);
const IMAGES = DATA.images.map(([name, of, kind, bad, score, as, width, height, boxes, thumb, map], place) =>
  ({ name, of, kind, bad, score, as, width, height, boxes, thumb, map, place }));
const LABELLED = IMAGES.some((one) => one.bad >= 0);
const $ = (id) => document.getElementById(id);
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "none");
let limit = DATA.threshold, shown = [], chosen = 0;

function element(parent, name, properties = {}, text) {
  const node = Object.assign(document.createElement(name), properties);
  if (text !== undefined) node.textContent = text; // never markup: names are somebody's data
  parent.append(node);
  return node;
}

function options(select, names, all) {
  element(select, "option", { value: "-1" }, all);
  names.forEach((name, number) => element(select, "option", { value: number }, name));
}

// ---- what the threshold does ----

function counts(images) {
  const found = { good: 0, bad: 0, alarms: 0, misses: 0, above: 0 };
  for (const one of images) {
    const above = one.score > limit;
    found.above += above;
    if (one.bad === 0) { found.good++; found.alarms += above; }
    if (one.bad === 1) { found.bad++; found.misses += !above; }
  }
  return found;
}

function inChart() {
  const of = +$("chart-class").value;
  return of < 0 ? IMAGES : IMAGES.filter((one) => one.of === of);
}

function showNumbers() {
  const images = inChart(), c = counts(images), box = $("numbers");
  box.replaceChildren();
  const card = (id, value, what) => { const div = element(box, "div"); element(div, "b", { id }, value); element(div, "span", {}, what); };
  if (LABELLED) {
    card("alarms", `${c.alarms} of ${c.good}`, `false alarms: ${percent(c.alarms, c.good)} of good images`);
    card("misses", `${c.misses} of ${c.bad}`, `misses: ${percent(c.misses, c.bad)} of defective images`);
  }
  card("above", `${c.above} of ${images.length}`, `called defective: ${percent(c.above, images.length)}`);
  if ($("limit") !== document.activeElement) $("limit").value = limit.toFixed(2);
}

function showTables() {
  const c = counts(IMAGES), confusion = $("confusion"), kinds = $("kinds");
  const row = (table, cells, kind = "td") => { const tr = element(table, "tr"); for (const cell of cells) element(tr, kind, {}, cell); };
  confusion.replaceChildren(); kinds.replaceChildren();
  row(confusion, ["", "called good", "called defective"], "th");
  row(confusion, ["good", c.good - c.alarms, c.alarms]);
  row(confusion, ["defective", c.misses, c.bad - c.misses]);
  row(kinds, ["class", "kind", "images", "called defective", "share", "AUROC"], "th");
  const groups = new Map();
  for (const one of IMAGES) {
    const key = `${one.of} ${one.kind}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(one);
  }
  const order = [...groups.values()].sort((a, b) => a[0].of - b[0].of || a[0].bad - b[0].bad || a[0].kind - b[0].kind);
  for (const images of order) {
    const above = images.filter((one) => one.score > limit).length, first = images[0];
    const good = IMAGES.filter((one) => one.of === first.of && one.bad === 0);
    const auroc = first.bad === 1 && good.length ? areaUnder(rocOf([...good, ...images])).toFixed(3) : "";
    row(kinds, [DATA.classes[first.of], DATA.kinds[first.kind] ?? "", images.length, above, percent(above, images.length), auroc]);
  }
}

function ranked(images) { return images.filter((one) => one.bad >= 0).sort((a, b) => b.score - a.score); }

// [[false alarms, found]] as shares, from the highest threshold to the lowest; equal scores are one step.
function rocOf(images) {
  const order = ranked(images), bad = order.filter((one) => one.bad === 1).length, good = order.length - bad;
  const points = [[0, 0]];
  let found = 0, alarms = 0;
  order.forEach((one, k) => {
    if (one.bad) found++; else alarms++;
    if (k + 1 === order.length || order[k + 1].score < one.score) points.push([good ? alarms / good : 0, bad ? found / bad : 0]);
  });
  return points;
}

function areaUnder(points) {
  let area = 0;
  for (let k = 1; k < points.length; k++) area += ((points[k][0] - points[k - 1][0]) * (points[k][1] + points[k - 1][1])) / 2;
  return area;
}

function precisionOf(images) {
  const order = ranked(images), bad = order.filter((one) => one.bad === 1).length, points = [];
  let found = 0;
  order.forEach((one, k) => {
    found += one.bad;
    if (bad && (k + 1 === order.length || order[k + 1].score < one.score)) points.push([found / bad, found / (k + 1)]);
  });
  return points;
}

function showCurves() {
  const images = inChart(), c = counts(images), found = c.bad - c.misses;
  curve($("roc"), rocOf(images), c.good && c.bad ? [c.alarms / c.good, found / c.bad] : null, "false alarms", "found");
  curve($("pr"), precisionOf(images), c.bad && found + c.alarms ? [found / c.bad, found / (found + c.alarms)] : null, "recall", "precision");
}

function showHistogram() {
  const images = inChart(), of = (bad) => images.filter((one) => one.bad === bad).map((one) => one.score);
  const groups = LABELLED
    ? [{ name: "good", className: "good", values: of(0) }, { name: "defective", className: "bad", values: of(1) }]
    : [{ name: "images", className: "good", values: of(-1) }];
  histogram($("histogram"), groups, limit, (value, ended) => setLimit(value, ended));
}

function setLimit(value, redraw = true) {
  if (!Number.isFinite(value)) return;
  limit = value;
  showNumbers();
  if (!redraw) return;
  showHistogram(); showCurves(); showTables(); filter();
}

// ---- pictures ----

const LEVELS = (() => { // 256 colours
  const stops = DATA.colors, table = new Uint8ClampedArray(256 * 4);
  for (let level = 0; level < 256; level++) {
    const at = (level / 255) * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c++) table[level * 4 + c] = stops[k][c] + (at - k) * (stops[k + 1][c] - stops[k][c]);
    table[level * 4 + 3] = Math.max(0, (level / 255 - 0.2) / 0.8) * 255;
  }
  return table;
})();

function frame(parent, one, withMap) {
  const box = element(parent, "div", { className: withMap ? "frame mapped" : "frame" });
  box.style.aspectRatio = `${one.width} / ${one.height}`;
  element(box, "img", { src: `data:image/${DATA.thumbnails};base64,${one.thumb}`, alt: one.name, draggable: false });
  if (!withMap) return box;
  const [rows, cols] = DATA.grid, canvas = element(box, "canvas", { width: cols * 8, height: rows * 8 });
  const bytes = atob(one.map), pixels = new ImageData(cols, rows);
  for (let k = 0; k < bytes.length; k++) pixels.data.set(LEVELS.subarray(bytes.charCodeAt(k) * 4, bytes.charCodeAt(k) * 4 + 4), k * 4);
  const small = Object.assign(document.createElement("canvas"), { width: cols, height: rows });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  // The outermost values are those of the image's own corners.
  context.drawImage(small, 0.5, 0.5, Math.max(0.01, cols - 1), Math.max(0.01, rows - 1), 0, 0, canvas.width, canvas.height);
  for (const [left, top, width, height] of one.boxes) {
    const mark = element(box, "i");
    Object.assign(mark.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`, height: `${100 * height}%` });
  }
  return box;
}

function verdictOf(one) {
  const above = one.score > limit;
  if (one.bad < 0) return above ? "defective" : "good";
  return one.bad ? (above ? "found" : "miss") : above ? "false alarm" : "passed";
}

const VERDICTS = LABELLED ? ["false alarm", "miss", "found", "passed"] : ["defective", "good"];

function filter() {
  const of = +$("class").value, kind = +$("kind").value, verdict = VERDICTS[+$("verdict").value], text = $("search").value.toLowerCase();
  shown = IMAGES.filter((one) => (of < 0 || one.of === of) && (kind < 0 || one.kind === kind) &&
    (!verdict || verdictOf(one) === verdict) && (!text || one.name.toLowerCase().includes(text)));
  const order = +$("order").value;
  shown.sort((a, b) => order * (a.score - b.score) || a.place - b.place);
  $("count").textContent = `${shown.length} of ${IMAGES.length} images`;
  chosen = Math.min(chosen, Math.max(0, shown.length - 1));
  layOut(true);
}

let columns = 1, cellWidth = 160, cellHeight = 200;
const drawn = new Map();

// Only what can be seen is in the page.
function layOut(anew) {
  const gallery = $("gallery"), sheet = $("sheet"), width = gallery.clientWidth - 4;
  columns = Math.max(2, Math.floor(width / 170));
  cellWidth = Math.floor(width / columns);
  const tallest = 1.25; // of a frame, in its width: longer ones are cut
  cellHeight = Math.floor((cellWidth - 10) * DATA.shape) + 46;
  cellHeight = Math.min(cellHeight, Math.floor(cellWidth * tallest) + 46);
  sheet.style.height = `${Math.ceil(shown.length / columns) * cellHeight}px`;
  const printing = matchMedia("print").matches;
  const first = printing ? 0 : Math.max(0, Math.floor(gallery.scrollTop / cellHeight) - 1) * columns;
  const last = printing ? columns * 6 : (Math.ceil((gallery.scrollTop + gallery.clientHeight) / cellHeight) + 1) * columns;
  if (anew) { for (const node of drawn.values()) node.remove(); drawn.clear(); }
  for (const [place, node] of drawn) if (place < first || place >= last) { node.remove(); drawn.delete(place); }
  for (let place = first; place < Math.min(last, shown.length); place++) {
    if (!drawn.has(place)) drawn.set(place, cell(sheet, shown[place], place));
    const node = drawn.get(place);
    Object.assign(node.style, { left: `${(place % columns) * cellWidth}px`, top: `${Math.floor(place / columns) * cellHeight}px`, width: `${cellWidth}px`, height: `${cellHeight}px` });
    node.classList.toggle("chosen", place === chosen);
  }
}

function cell(sheet, one, place) {
  const node = element(sheet, "div", { className: "cell" });
  node.dataset.name = one.name;
  const box = frame(node, one, true);
  box.style.width = `${Math.min(cellWidth - 10, ((cellHeight - 46) * one.width) / one.height)}px`;
  const text = element(node, "p");
  element(text, "span", { className: `tag ${one.score > limit ? "bad" : "good"}` }, `${one.score.toFixed(2)} ${verdictOf(one)}`);
  text.append(" ", one.name);
  node.addEventListener("click", () => { chosen = place; layOut(false); enlarge(); });
  return node;
}

function enlarge() {
  const one = shown[chosen];
  if (!one) return;
  const stage = $("stage");
  stage.replaceChildren();
  const side = Math.min(innerWidth * 0.44, (innerHeight * 0.7 * one.width) / one.height, 700);
  for (const withMap of [false, true]) frame(stage, one, withMap).style.width = `${innerWidth < 560 ? innerWidth * 0.86 : side}px`;
  const recognized = one.as === one.of ? "" : `, recognized as ${DATA.classes[one.as] ?? "none for sure"}`;
  const kind = DATA.kinds[one.kind] ? `, ${DATA.kinds[one.kind]}` : "";
  $("facts").textContent = `${one.name}: ${verdictOf(one)}, score ${one.score.toFixed(3)} (threshold ${limit.toFixed(2)}); ` +
    `${DATA.classes[one.of] ?? ""}${kind}${recognized}; ${one.width} x ${one.height} pixels, ${one.boxes.length} regions`;
  if (!$("large").open) $("large").showModal();
}

function move(by) {
  const to = chosen + by;
  if (to < 0 || to >= shown.length) return;
  chosen = to;
  const gallery = $("gallery"), top = Math.floor(chosen / columns) * cellHeight;
  if (top < gallery.scrollTop) gallery.scrollTop = top;
  if (top + cellHeight > gallery.scrollTop + gallery.clientHeight) gallery.scrollTop = top + cellHeight - gallery.clientHeight;
  layOut(false);
  if ($("large").open) enlarge();
}

addEventListener("keydown", (event) => {
  const inside = $("large").open || document.activeElement === $("gallery");
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (!inside) return;
  if (by !== undefined) { event.preventDefault(); move($("large").open ? Math.sign(by) : by); }
  else if (event.key === "Enter" && !$("large").open) { event.preventDefault(); enlarge(); }
});

// ---- the page ----

document.body.classList.toggle("unlabelled", !LABELLED);
options($("class"), DATA.classes, "all"); options($("chart-class"), DATA.classes, "all");
options($("kind"), DATA.kinds, "all"); options($("verdict"), VERDICTS, "all");
for (const id of ["class", "kind", "verdict", "order"]) $(id).addEventListener("change", () => { chosen = 0; $("gallery").scrollTop = 0; filter(); });
$("search").addEventListener("input", () => { chosen = 0; $("gallery").scrollTop = 0; filter(); });
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("chart-class").addEventListener("change", () => setLimit(limit));
$("opacity").addEventListener("input", () => document.documentElement.style.setProperty("--map", $("opacity").value / 100));
$("limit").addEventListener("input", () => setLimit(parseFloat($("limit").value)));
$("reset").addEventListener("click", () => { $("limit").blur(); setLimit(DATA.threshold); });
$("gallery").addEventListener("scroll", () => layOut(false));
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
addEventListener("resize", () => { showHistogram(); showCurves(); layOut(true); });
addEventListener("beforeprint", () => layOut(true));
setLimit(limit);
