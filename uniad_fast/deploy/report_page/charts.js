"use strict";
// Charts in SVG: a histogram with a line to drag, and curves with the point where one stands.
const NS = "http://www.w3.org/2000/svg";

function shape(parent, name, attributes, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(+value.toFixed(10));
  return found;
}

// groups: [{className, values}]; values beyond the range are counted in the outermost bins.
function histogram(svg, groups, limit, moved) {
  const width = Math.max(svg.clientWidth, 300), height = 210, left = 34, bottom = 24, right = 12, top = 14;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  svg.replaceChildren();
  const all = groups.flatMap((group) => group.values).sort((a, b) => a - b);
  const at = (share) => all[Math.min(all.length - 1, Math.floor(share * all.length))] ?? 0;
  let low = Math.min(at(0.002), limit), high = Math.max(at(0.9), limit) * 1;
  high = Math.min(Math.max(high, limit + (limit - low) * 0.6), Math.max(at(1), limit + 1e-6));
  if (!(high > low)) [low, high] = [low - 1, low + 1];
  const margin = (high - low) * 0.03;
  low -= margin; high += margin;
  const x = (value) => left + ((Math.min(Math.max(value, low), high) - low) / (high - low)) * (width - left - right);
  const bins = Math.max(12, Math.min(60, Math.round((width - left) / 18)));
  const counts = groups.map((group) => {
    const found = new Array(bins).fill(0);
    for (const value of group.values)
      found[Math.max(0, Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins)))]++;
    return found;
  });
  const most = Math.max(1, ...counts.flat());
  const y = (count) => top + (1 - Math.sqrt(count / most)) * (height - top - bottom);
  const step = (width - left - right) / bins, part = step / groups.length;
  counts.forEach((found, g) => found.forEach((count, bin) => {
    if (!count) return;
    const bar = { x: left + bin * step + g * part, y: y(count), width: Math.max(1, part - 1), height: height - bottom - y(count), class: groups[g].className };
    shape(shape(svg, "rect", bar), "title", {}, `${count} ${groups[g].name}`);
  }));
  shape(svg, "line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" });
  for (const value of ticks(low, high, width / 90)) shape(svg, "text", { x: x(value), y: height - 8, "text-anchor": "middle" }, value);
  for (const count of [most, Math.round(most / 4)].filter((c) => c > 0))
    shape(svg, "text", { x: left - 5, y: y(count) + 4, "text-anchor": "end" }, count);
  groups.forEach((group, g) => {
    shape(svg, "rect", { x: width - right - 84, y: top + 16 * g, width: 10, height: 10, class: group.className });
    shape(svg, "text", { x: width - right - 70, y: top + 9 + 16 * g }, group.name);
  });
  const line = shape(svg, "g", { id: "limit-line" });
  shape(line, "line", { x1: x(limit), x2: x(limit), y1: top - 6, y2: height - bottom, class: "limit" });
  shape(line, "rect", { x: x(limit) - 12, y: top - 8, width: 24, height: height - bottom - top + 8, class: "grab" });
  shape(line, "circle", { cx: x(limit), cy: top, r: 6, class: "grip" });
  line.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    const value = (e) => low + ((((e.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width - left) / (width - left - right)) * (high - low);
    const move = (e) => {
      const to = Math.min(high, Math.max(low, value(e)));
      for (const node of line.children) {
        if (node.tagName === "line") { node.setAttribute("x1", x(to)); node.setAttribute("x2", x(to)); }
        else if (node.tagName === "circle") node.setAttribute("cx", x(to));
        else node.setAttribute("x", x(to) - 12);
      }
      moved(to, false);
    };
    const end = (e) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      moved(Math.min(high, Math.max(low, value(e))), true);
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
  });
}

// points: [[across, up]] in [0, 1], here: where one stands.
function curve(svg, points, here, across, up) {
  const width = Math.max(svg.clientWidth, 240), height = 220, left = 34, bottom = 30, right = 10, top = 8;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  svg.replaceChildren();
  const x = (value) => left + value * (width - left - right), y = (value) => top + (1 - value) * (height - top - bottom);
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    shape(svg, "line", { x1: x(0), x2: x(1), y1: y(value), y2: y(value), class: "axis" });
    shape(svg, "text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value);
    shape(svg, "text", { x: x(value), y: height - bottom + 14, "text-anchor": "middle" }, value);
  }
  shape(svg, "text", { x: x(0.5), y: height - 3, "text-anchor": "middle" }, across);
  shape(svg, "text", { x: left + 4, y: top + 10 }, up);
  if (points.length) shape(svg, "polyline", { points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), class: "curve" });
  if (here) shape(svg, "circle", { cx: x(here[0]), cy: y(here[1]), r: 5, class: "point" });
}
