// The page of `clipworks serve`. No library, nothing from outside; what comes from the server is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);
const el = (tag, props = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), props);
  for (const [key, value] of Object.entries(props)) if (key.includes("-") || key === "role") made.setAttribute(key, value);
  made.append(...children);
  return made;
};
const picture = (id, side = 256) => `/images/${id}?side=${side}`;
const number = (n) => n.toLocaleString("en");
const words = (text) => [...new Set(text.split(",").map((w) => w.trim()).filter(Boolean))];
const PAGE = 60;

// -- the server ------------------------------------------------------------------------------------------------------

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

async function api(path, body, signal) {
  for (let attempt = 0; ; attempt++) {
    let answer;
    try {
      answer = await fetch(path, body === undefined ? { signal } : {
        method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      await back();
      continue;
    }
    if (answer.ok) return answer.status === 204 ? null : answer.json();
    const told = await answer.json().catch(() => ({}));
    if (answer.status === 401 && path !== "/login") { await login(); continue; }
    if (answer.status === 429 && attempt < 6) {
      await wait(1000 * Number(answer.headers.get("retry-after") || 1) * (1 + Math.random()));
      continue;
    }
    throw new Error(told.error || `the server answered ${answer.status}`);
  }
}

let returning = null;
function back() { // one loop that waits for a server that is away, however many requests ask
  returning ??= (async () => {
    $("away").hidden = false;
    for (let ms = 500; ; ms = Math.min(2 * ms, 5000)) {
      await wait(ms);
      if ((await fetch("/healthz").catch(() => ({ ok: false }))).ok) break;
    }
    $("away").hidden = true;
    returning = null;
  })();
  return returning;
}

let asking = null;
function login() {
  asking ??= new Promise((done) => {
    const box = $("login");
    box.oncancel = (event) => event.preventDefault();
    box.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await api("/login", { token: $("token").value });
        $("token").value = $("login-status").textContent = "";
        box.close();
        asking = null;
        done();
      } catch (error) { $("login-status").textContent = error.message; }
    };
    box.showModal();
  });
  return asking;
}

// -- what the page knows ---------------------------------------------------------------------------------------------

const page = { about: null, query: {}, ends: false, busy: null, shown: 0, open: null, target: null };
const seen = new Map(); // id -> item
const selected = new Set();
const sets = { a: [], b: [] };
let labels = {}; // id -> {label, name}

const keep = () => {
  try { localStorage.setItem(`labels ${page.about.fingerprint}`, JSON.stringify(labels)); } catch { /* a full or closed store */ }
};

async function start() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.className = theme;
  page.about = await api("/collection");
  try { labels = JSON.parse(localStorage.getItem(`labels ${page.about.fingerprint}`)) || {}; } catch { labels = {}; }
  $("about").textContent = `${number(page.about.rows)} images · ${page.about.encoder || "vectors"}`;
  route();
}

function route() {
  const [name, text] = location.hash.slice(1).split("?");
  const view = $(`view-${name}`) ? name : "search";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== `view-${view}`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (view === "search") restore(new URLSearchParams(text || ""));
  if (view === "map") showMap();
  if (view === "labels") showLabels();
  if (view === "compare") showSets();
  targets();
}

// -- search ----------------------------------------------------------------------------------------------------------

let image = null; // {vector, address}: an image that was dropped

function restore(params) { // the address holds the query, so that Back works
  $("words").value = params.get("q") || "";
  $("minus").value = params.get("minus") || "";
  page.query.like = params.get("like");
  if (params.get("image") === null) image = null;
  search();
}

function go(changes = {}) {
  const given = { q: $("words").value.trim(), minus: $("minus").value.trim(), like: page.query.like, image: image && "1", ...changes };
  const params = new URLSearchParams(Object.entries(given).filter(([, value]) => value));
  const hash = `#search${params.size ? "?" + params : ""}`;
  if (location.hash === hash) search(); else location.hash = hash;
}

function conditions() {
  return [...$("filters").children].map((row) => {
    const [column, operator, value] = row.querySelectorAll("select, input");
    const kind = page.about.columns.find((c) => c.name === column.value).type;
    const needs = !["missing", "present"].includes(operator.value);
    if (needs && value.value === "") return null;
    const typed = /string/.test(kind) ? value.value : kind === "bool" ? value.value === "true" : Number(value.value);
    return { column: column.value, operator: operator.value, value: needs ? typed : null };
  }).filter(Boolean);
}

async function search() {
  const parts = $("parts");
  parts.replaceChildren();
  if (page.query.like) parts.append(chip("like", picture(page.query.like, 96), () => go({ like: "" })));
  if (image) parts.append(chip("image", image.address, () => { image = null; go({ image: "" }); }));
  page.shown = 0;
  page.ends = false;
  page.busy?.abort();
  page.busy = null;
  $("grid").replaceChildren();
  await more();
}

async function more() {
  if (page.ends || page.busy) return;
  const busy = page.busy = new AbortController();
  const body = { k: PAGE, offset: page.shown, where: conditions(), columns: page.about.columns.map((c) => c.name).slice(0, 32) };
  const text = $("words").value.trim(), minus = words($("minus").value).slice(0, 8);
  if (text) body.text = text;
  if (minus.length) body.minus = minus;
  if (page.query.like) body.like = page.query.like;
  if (image) body.vector = image.vector;
  $("more").hidden = true;
  if (!page.shown) $("status").textContent = "Searching …";
  try {
    const found = await api("/search", body, busy.signal);
    if (page.busy !== busy) return;
    for (const item of found.items) { seen.set(item.id, item); $("grid").append(tile(item)); }
    page.shown += found.items.length;
    const deepest = page.shown + PAGE > page.about.limits.deepest;
    page.ends = !found.more || deepest;
    $("status").textContent = !page.about.rows ? "This collection is empty. `clipworks embed PHOTOS --out …` fills it; then reload."
      : !found.total ? "No image meets the conditions."
      : found.more && deepest ? `The first ${number(page.shown)} of ${number(found.total)}. Narrow the search to see others.`
      : `${number(page.shown)} of ${number(found.total)} shown`;
  } catch (error) {
    if (error.name === "AbortError") return;
    page.ends = true;
    $("status").textContent = error.message;
  } finally {
    if (page.busy === busy) page.busy = null;
  }
  $("more").hidden = page.ends;
  if (!page.ends && $("more").getBoundingClientRect().top < innerHeight + 600) more();
}

function chip(text, address, remove) {
  return el("span", { className: "chip" }, text, el("img", { src: address, alt: "" }),
    el("button", { type: "button", textContent: "×", "aria-label": `Remove ${text}`, onclick: remove }));
}

function thumbnail(id, side = 256) {
  const img = el("img", { loading: "lazy", decoding: "async", alt: seen.get(id)?.name || "image" });
  img.onerror = () => img.replaceWith(el("span", { className: "gone", textContent: "no picture" }));
  img.src = picture(id, side);
  return img;
}

function tile(item) {
  const caption = el("figcaption", {}, el("span", { textContent: item.name.split("/").pop(), title: item.name }),
    el("span", { className: "quiet", textContent: item.score == null ? "" : item.score.toFixed(3) }));
  const open = el("button", { type: "button", className: "open", "aria-label": item.name, onclick: () => detail(item.id) },
    thumbnail(item.id), caption);
  const pick = el("button", { type: "button", className: "pick", textContent: "✓", "aria-label": `Select ${item.name}`,
    onclick: (event) => choose(item.id, event.shiftKey) });
  const made = el("figure", { className: "tile", role: "gridcell" }, open, pick);
  made.dataset.id = item.id;
  mark(made);
  return made;
}

function mark(figure) {
  const id = figure.dataset.id, on = selected.has(id);
  figure.classList.toggle("selected", on);
  figure.querySelector(".pick").setAttribute("aria-pressed", on);
  figure.querySelector(".given")?.remove();
  if (labels[id]) figure.append(el("span", { className: "given", textContent: labels[id].label }));
}

let anchor = null;
function choose(id, range) {
  const all = [...$("grid").children].map((figure) => figure.dataset.id);
  const on = !selected.has(id);
  const [from, to] = [all.indexOf(anchor), all.indexOf(id)].sort((x, y) => x - y);
  for (const each of range && from >= 0 ? all.slice(from, to + 1) : [id]) if (on) selected.add(each); else selected.delete(each);
  anchor = id;
  changed();
}

function changed() {
  for (const figure of $("grid").children) mark(figure);
  for (const place of document.querySelectorAll(".selected-count")) place.textContent = number(selected.size);
  $("bar").hidden = !selected.size;
  $("known-labels").replaceChildren(...[...new Set(Object.values(labels).map((l) => l.label))].map((value) => el("option", { value })));
  targets();
  if (!$("view-map").hidden) draw();
}

function detail(id) {
  const item = seen.get(id) || { name: id, columns: {} };
  page.open = id;
  $("large").src = picture(id, 1024);
  $("large").alt = item.name;
  $("detail-name").textContent = item.name;
  const facts = { score: item.score?.toFixed(4), ...item.columns, "your label": labels[id]?.label };
  $("detail-facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value != null)
    .flatMap(([key, value]) => [el("dt", { textContent: key }), el("dd", { textContent: key === "mtime" ? new Date(1000 * value).toLocaleString() : value })]));
  $("do-select").textContent = selected.has(id) ? "Unselect" : "Select";
  if (!$("detail").open) $("detail").showModal();
}

function similar(id) {
  $("detail").close();
  image = null;
  $("words").value = $("minus").value = "";
  scrollTo(0, 0);
  go({ q: "", minus: "", image: "", like: id });
}

async function dropped(file) {
  if (!file) return;
  const view = document.querySelector("main > section:not([hidden])").id.slice(5);
  const tool = ["classify", "masks", "defects"].includes(view);
  const status = tool ? $(`${view}-status`) : $("status");
  try {
    const sent = await shrunk(file);
    if (tool) { page.target = sent; targets(); status.textContent = ""; return; }
    status.textContent = "Reading the image …";
    const found = await api("/embed", { images: [sent.data] });
    image = { vector: found.vectors[0], address: sent.address };
    page.query.like = "";
    go({ like: "", image: String(Date.now()) });
  } catch (error) { status.textContent = error.message; }
}

async function shrunk(file) { // large photos, and kinds that the server does not read, are drawn anew: it takes 10 MiB
  const bitmap = await createImageBitmap(file).catch(() => { throw new Error("this file is no image that the browser can read."); });
  if (file.size < 4e6 && /^image\/(jpeg|png|webp|gif|bmp)$/.test(file.type) && bitmap.width * bitmap.height <= page.about.limits.pixels) {
    const address = await new Promise((done, fail) => {
      const reader = Object.assign(new FileReader(), { onload: () => done(reader.result), onerror: () => fail(new Error("this file cannot be read.")) });
      reader.readAsDataURL(file);
    });
    return { address, data: address.split(",")[1], name: file.name };
  }
  const factor = Math.min(1, 1280 / Math.max(bitmap.width, bitmap.height));
  const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * factor)), height: Math.max(1, Math.round(bitmap.height * factor)) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // transparent pixels lie over white, as in the library
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const address = canvas.toDataURL("image/jpeg", 0.92);
  return { address, data: address.split(",")[1], name: file.name };
}

function addFilter() {
  if (!page.about.columns.length) return;
  const column = el("select", { "aria-label": "Column" }, ...page.about.columns.map((c) => el("option", { textContent: c.name })));
  const row = el("div", { className: "filter" }, column);
  const rest = () => {
    const { type, values } = page.about.columns.find((c) => c.name === column.value);
    const text = /string/.test(type);
    const names = text ? ["is", "is not", "contains", "missing", "present"] : type === "bool" ? ["is", "missing", "present"]
      : ["at least", "at most", "above", "below", "is", "missing", "present"];
    const operator = el("select", { "aria-label": "Comparison" }, ...names.map((n) => el("option", { textContent: n })));
    const value = values && type !== "bool" ? el("select", { "aria-label": "Value" },
      ...values.map((v) => el("option", { value: v.value, textContent: `${v.value} (${number(v.count)})` })))
      : el("input", { type: text || type === "bool" ? "text" : "number", step: "any", maxLength: 500, "aria-label": "Value" });
    operator.onchange = () => { value.hidden = ["missing", "present"].includes(operator.value); };
    operator.addEventListener("change", search);
    value.onchange = search;
    while (row.children.length > 1) row.lastChild.remove();
    row.append(operator, value, el("button", { type: "button", textContent: "×", "aria-label": "Remove the filter",
      onclick: () => { row.remove(); search(); } }));
  };
  column.onchange = () => { rest(); search(); };
  const first = page.about.columns.find((c) => c.values) || page.about.columns[0];
  column.value = first.name;
  rest();
  $("filters").append(row);
  search();
}

// -- map -------------------------------------------------------------------------------------------------------------

const map = { data: null, scale: 1, x: 0, y: 0, line: [], drag: null, pinch: new Map() };
const COLOURS = ["#3987d6", "#e0842c", "#3a9c4e", "#c94a4a", "#8f6bc4", "#8a6552", "#d873b4", "#909090", "#b3a52b", "#35a8b5"];

async function showMap() {
  if (!map.data) {
    $("map-status").textContent = "Placing the images …";
    try { map.data = await api("/map"); } catch (error) { $("map-status").textContent = error.message; return; }
    map.data.ids.forEach((id, i) => { if (!seen.has(id)) seen.set(id, { id, name: map.data.names[i], columns: { label: map.data.labels[i] } }); });
  }
  const { total, ids, explained } = map.data;
  $("map-status").textContent = !total ? "This collection is empty." : `${number(ids.length)} of ${number(total)} images; the two axes hold ` +
    `${Math.round(100 * (explained[0] + explained[1]))} % of the variance`;
  fit();
}

function fit() {
  const { x, y } = map.data;
  const box = $("canvas").getBoundingClientRect();
  const range = (v) => v.reduce(([low, high], n) => [Math.min(low, n), Math.max(high, n)], [Infinity, -Infinity]);
  const [left, right] = range(x), [low, high] = range(y);
  map.scale = 0.92 * Math.min(box.width / Math.max(right - left, 1e-6), box.height / Math.max(high - low, 1e-6)) || 1;
  map.x = (left + right) / 2 || 0;
  map.y = (low + high) / 2 || 0;
  draw();
}

const place = (i, box) => [(map.data.x[i] - map.x) * map.scale + box.width / 2, (map.y - map.data.y[i]) * map.scale + box.height / 2];

function draw() {
  if (!map.data) return;
  const canvas = $("canvas"), box = canvas.getBoundingClientRect(), dense = devicePixelRatio || 1;
  canvas.width = box.width * dense;
  canvas.height = box.height * dense;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.scale(dense, dense);
  const label = (i) => labels[map.data.ids[i]]?.label ?? map.data.labels[i];
  const count = new Map();
  map.data.ids.forEach((_, i) => { const l = label(i); if (l != null) count.set(l, (count.get(l) || 0) + 1); });
  const known = [...count].sort((p, q) => q[1] - p[1]).map(([l]) => l);
  const colour = (l) => COLOURS[known.indexOf(l) < 9 && known.includes(l) ? known.indexOf(l) : known.length ? 7 : 0];
  const size = map.data.ids.length > 3000 ? 2 : 4;
  for (const chosen of [false, true]) {
    map.data.ids.forEach((id, i) => {
      if (selected.has(id) !== chosen) return;
      const [x, y] = place(i, box);
      if (x < -9 || y < -9 || x > box.width + 9 || y > box.height + 9) return;
      pen.beginPath();
      pen.arc(x, y, chosen ? size + 2 : size, 0, 7);
      pen.globalAlpha = chosen ? 1 : 0.7;
      pen.fillStyle = colour(label(i));
      pen.fill();
      if (chosen) { pen.strokeStyle = style.getPropertyValue("--ink"); pen.lineWidth = 1.5; pen.stroke(); }
    });
  }
  pen.globalAlpha = 1;
  if (map.line.length > 1) {
    pen.beginPath();
    map.line.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.strokeStyle = style.getPropertyValue("--strong");
    pen.lineWidth = 2;
    pen.stroke();
  }
  $("legend").replaceChildren(...known.slice(0, 9).map((l) => {
    const dot = el("span", { className: "dot" });
    dot.style.background = colour(l);
    return el("span", {}, dot, ` ${l} (${number(count.get(l))})`);
  }), known.length > 9 ? `and ${known.length - 9} others` : "");
}

function within([x, y], line) {
  let inside = false;
  for (let i = 0, j = line.length - 1; i < line.length; j = i++) {
    const [a, b] = line[i], [c, d] = line[j];
    if ((b > y) !== (d > y) && x < ((c - a) * (y - b)) / (d - b) + a) inside = !inside;
  }
  return inside;
}

function zoom(factor, x, y) {
  const box = $("canvas").getBoundingClientRect();
  const dx = (x ?? box.width / 2) - box.width / 2, dy = (y ?? box.height / 2) - box.height / 2;
  map.x += dx / map.scale - dx / (map.scale * factor);
  map.y -= dy / map.scale - dy / (map.scale * factor);
  map.scale *= factor;
  draw();
}

function nearest(x, y) {
  const box = $("canvas").getBoundingClientRect();
  let best = -1, least = 14 ** 2;
  map.data?.ids.forEach((_, i) => {
    const [a, b] = place(i, box), far = (a - x) ** 2 + (b - y) ** 2;
    if (far < least) [best, least] = [i, far];
  });
  return best;
}

function mapEvents() {
  const canvas = $("canvas"), at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const lassoing = () => $("lasso").getAttribute("aria-pressed") === "true";
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    map.pinch.set(event.pointerId, at(event));
    map.drag = at(event);
    map.line = lassoing() && map.pinch.size === 1 && !event.shiftKey ? [at(event)] : [];
  };
  canvas.onpointermove = (event) => {
    const [x, y] = at(event);
    if (map.pinch.size === 2 && map.pinch.has(event.pointerId)) {
      const gap = () => { const [p, q] = [...map.pinch.values()]; return Math.hypot(p[0] - q[0], p[1] - q[1]) || 1; };
      const before = gap();
      map.pinch.set(event.pointerId, [x, y]);
      map.line = [];
      return zoom(gap() / before, x, y);
    }
    if (!map.drag) return hover(x, y);
    $("hover").hidden = true;
    if (map.line.length) map.line.push([x, y]);
    else { map.x -= (x - map.drag[0]) / map.scale; map.y += (y - map.drag[1]) / map.scale; map.drag = [x, y]; }
    draw();
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    map.pinch.delete(event.pointerId);
    const line = map.line, moved = line.length > 4;
    map.drag = null;
    map.line = [];
    if (moved) {
      const box = canvas.getBoundingClientRect();
      if (!event.ctrlKey) selected.clear();
      map.data.ids.forEach((id, i) => { if (within(place(i, box), line)) selected.add(id); });
      changed();
    } else if (event.type === "pointerup" && nearest(...at(event)) >= 0 && line.length) detail(map.data.ids[nearest(...at(event))]);
    draw();
  };
  canvas.onpointerleave = () => { $("hover").hidden = true; };
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 400), ...at(event)); }, { passive: false });
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (move) { map.x += (40 * move[0]) / map.scale; map.y += (40 * move[1]) / map.scale; draw(); event.preventDefault(); }
    if (event.key === "+" || event.key === "=") zoom(1.3);
    if (event.key === "-") zoom(1 / 1.3);
  };
  $("lasso").onclick = () => $("lasso").setAttribute("aria-pressed", !lassoing());
  $("closer").onclick = () => zoom(1.5);
  $("farther").onclick = () => zoom(1 / 1.5);
  $("whole").onclick = fit;
  new ResizeObserver(() => { if (!$("view-map").hidden) draw(); }).observe($("map-frame"));
}

function hover(x, y) {
  const i = nearest(x, y), box = $("hover");
  box.hidden = i < 0;
  if (i < 0) return;
  const id = map.data.ids[i], [img, caption] = box.children;
  if (img.dataset.id !== id) { img.dataset.id = id; img.src = picture(id, 160); caption.textContent = map.data.names[i]; }
  box.style.left = `${Math.min(x + 14, $("canvas").clientWidth - 150)}px`;
  box.style.top = `${Math.min(y + 14, $("canvas").clientHeight - 170)}px`;
}

// -- compare, labels -------------------------------------------------------------------------------------------------

function keepAs(side) {
  sets[side] = [...selected];
  selected.clear();
  changed();
  location.hash = "#compare";
  showSets();
}

function showSets() {
  for (const side of ["a", "b"]) {
    $(`count-${side}`).textContent = sets[side].length ? `${number(sets[side].length)} images` : side === "b" ? "all other images" : "none yet";
    $(`strip-${side}`).replaceChildren(...sets[side].slice(0, 12).map((id) => thumbnail(id, 96)));
    $(`words-${side}`).replaceChildren();
  }
  $("compare-status").textContent = "";
  $("compare").disabled = !sets.a.length;
}

async function compare() {
  await working("compare-status", "Comparing …", async () => {
    const found = await api("/compare", { a: sets.a.slice(0, 20000), b: sets.b.length ? sets.b.slice(0, 20000) : null });
    for (const side of ["a", "b"]) {
      $(`words-${side}`).replaceChildren(...found[side].map((w) => bar(w.word, (w.auroc - 0.5) * 2, w.auroc.toFixed(2))));
    }
    return "The number: how often the word fits an image of this side better than one of the other.";
  });
}

function bar(name, value, shown) {
  return el("li", {}, el("span", { textContent: name }), el("meter", { min: 0, max: 1, value: Math.max(0, value), "aria-label": name }),
    el("span", { className: "value", textContent: shown }));
}

function assign(label) {
  for (const id of selected) labels[id] = { label, name: seen.get(id)?.name || id };
  keep();
  selected.clear();
  changed();
}

function showLabels() {
  const by = new Map();
  for (const [id, { label }] of Object.entries(labels)) by.set(label, [...(by.get(label) || []), id]);
  const few = [...by].filter(([, ids]) => ids.length < 2).map(([l]) => l);
  $("labels-status").textContent = !by.size ? "No labels yet: select images in the search or on the map and assign one."
    : `${number(Object.keys(labels).length)} images with ${by.size} labels` +
      (by.size < 2 ? "; a classifier needs two labels." : few.length ? `; only one image: ${few.join(", ")}.` : "");
  $("export").disabled = $("clear-labels").disabled = !by.size;
  $("label-list").replaceChildren(...[...by].sort().map(([label, ids]) => el("div", {}, el("h2", { textContent: `${label} (${ids.length})` }),
    el("div", { className: "strip" }, ...ids.slice(0, 60).map((id) => el("button", { type: "button", title: "Remove this label",
      "aria-label": `Remove the label of ${labels[id].name}`, onclick: () => { delete labels[id]; keep(); changed(); showLabels(); } }, thumbnail(id, 96)))))));
}

function save() {
  const cell = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = Object.values(labels).map(({ label, name }) => `${cell(name)},${cell(label)}`).sort();
  const address = URL.createObjectURL(new Blob([["path,label", ...lines, ""].join("\n")], { type: "text/csv" }));
  el("a", { href: address, download: "labels.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// -- classify, masks, defects ----------------------------------------------------------------------------------------

function targets() { // what the three tools would work on now
  const many = selected.size > 1 ? `, or the ${number(selected.size)} selected (first 40)` : "";
  for (const place of document.querySelectorAll(".target")) {
    const own = place.closest("#classify") && !page.target && selected.size ? `on the ${number(Math.min(40, selected.size))} selected` : "";
    place.textContent = own || (page.target ? `on ${page.target.name || "the image"}` : "Drop an image here, open one of the collection, or select some") + (page.target && place.closest("#classify") ? many : "");
  }
  if (page.target && !document.querySelector(".target img")) {
    for (const place of document.querySelectorAll(".target")) place.append(" ", el("button", { type: "button", textContent: "×", "aria-label": "Forget the image", onclick: () => { page.target = null; targets(); } }));
  }
}

const given = () => {
  if (page.target?.data) return { image: page.target.data };
  const id = page.target?.id || [...selected][0];
  if (!id) throw new Error("Drop an image on the page, or open one of the collection first.");
  return { id };
};

async function working(status, text, work) {
  const form = $(status).previousElementSibling, button = form?.querySelector?.(".main");
  $(status).textContent = text;
  if (button) button.disabled = true;
  try { $(status).textContent = (await work()) || ""; } catch (error) { $(status).textContent = error.message; }
  if (button) button.disabled = false;
}

async function classify() {
  await working("classify-status", "Classifying …", async () => {
    const body = { names: words($("names").value), none: $("none").checked };
    if ($("template").value.trim()) body.templates = [$("template").value.includes("{}") ? $("template").value : `${$("template").value} {}`];
    if (page.target?.data) body.images = [page.target.data];
    else body.ids = page.target?.id ? [page.target.id] : [...selected].slice(0, 40);
    if (!body.images && !body.ids.length) throw new Error("Drop an image on the page, or select some in the search.");
    const found = await api("/classify", body);
    $("answers").replaceChildren(...found.answers.map((answer) => {
      const best = Object.entries(answer.scores).sort((p, q) => q[1] - p[1]).slice(0, 8);
      const img = answer.id ? thumbnail(answer.id) : el("img", { src: page.target.address, alt: "the image" });
      return el("div", { className: "answer" }, img, el("div", {}, el("h2", { textContent: answer.label }),
        el("ol", { className: "bars" }, ...best.map(([name, p]) => bar(name, p, `${(100 * p).toFixed(1)} %`))),
        el("p", { className: "quiet", textContent: `best cosine ${answer.fit.toFixed(3)}` + (found.threshold == null ? "" : `, none of these up to ${found.threshold.toFixed(3)}`) })));
    }));
    return body.none && found.threshold == null ? "The collection is too small to tell what fits none of the names." : "";
  });
}

async function masks() {
  await working("masks-status", "Looking at every pixel …", async () => {
    const found = await api("/segment", { names: words($("mask-names").value), background: $("background").checked ? 0.5 : null, ...given() });
    $("mask-result").replaceChildren(el("img", { src: found.overlay, alt: "The image with its mask" }),
      el("ol", { className: "bars" }, ...found.names.map((n) => bar(n.name, n.share, `${(100 * n.share).toFixed(1)} %`))));
  });
}

async function defects() {
  await working("defects-status", "Inspecting …", async () => {
    const body = { name: $("object").value.trim() || "object", ...given() };
    if ($("use-good").checked) body.normal = [...selected].filter((id) => id !== body.id).slice(0, 32);
    const found = await api("/inspect", body);
    $("defect-result").replaceChildren(el("img", { src: found.overlay, alt: "The image with its heat map" }), el("div", {},
      el("h2", { className: found.defective ? "bad" : "good", textContent: found.defective ? "Defective" : "Good" }),
      el("p", { textContent: `score ${found.score.toFixed(3)}, threshold ${found.threshold.toFixed(3)}, ${found.regions.length} regions` }),
      el("p", { className: "quiet", textContent: found.method === "winclip" ? "by words" : "by the images of good parts" })));
  });
}

// -- events ----------------------------------------------------------------------------------------------------------

function events() {
  const submit = (id, work) => { $(id).onsubmit = (event) => { event.preventDefault(); work(); }; };
  submit("query", () => go());
  submit("classify", classify);
  submit("masks", masks);
  submit("defects", defects);
  submit("assign", () => { if ($("label").value.trim()) assign($("label").value.trim()); });
  $("file").onchange = () => { dropped($("file").files[0]); $("file").value = ""; };
  $("add-filter").onclick = addFilter;
  $("more").onclick = more;
  $("compare").onclick = compare;
  $("swap").onclick = () => { [sets.a, sets.b] = [sets.b, sets.a]; showSets(); };
  $("forget").onclick = () => { sets.a = sets.b = []; showSets(); };
  $("as-a").onclick = () => keepAs("a");
  $("as-b").onclick = () => keepAs("b");
  $("unselect").onclick = () => { selected.clear(); changed(); };
  $("export").onclick = save;
  $("clear-labels").onclick = () => { if (confirm("Remove all labels?")) { labels = {}; keep(); changed(); showLabels(); } };
  $("do-similar").onclick = () => similar(page.open);
  $("do-select").onclick = () => { choose(page.open); detail(page.open); };
  for (const [button, view] of [["do-classify", "classify"], ["do-mask", "masks"], ["do-inspect", "defects"]]) {
    $(button).onclick = () => {
      page.target = { id: page.open, name: seen.get(page.open)?.name };
      $("detail").close();
      location.hash = `#${view}`;
      $(view).requestSubmit();
    };
  }
  $("detail").querySelector(".close").onclick = () => $("detail").close();
  $("detail").onclick = (event) => { if (event.target === $("detail")) $("detail").close(); };
  $("theme").onclick = () => {
    const dark = document.documentElement.className === "dark" || (!document.documentElement.className && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.className = dark ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.className);
    draw();
  };
  new IntersectionObserver((entries) => { if (entries[0].isIntersecting) more(); }, { rootMargin: "600px" }).observe($("more"));
  let depth = 0; // dragenter and dragleave come for every element below
  const files = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => { if (files(event)) { depth++; $("drop").hidden = false; } });
  addEventListener("dragleave", (event) => { if (files(event) && --depth <= 0) $("drop").hidden = true; });
  addEventListener("dragover", (event) => { if (files(event)) event.preventDefault(); });
  addEventListener("drop", (event) => { event.preventDefault(); depth = 0; $("drop").hidden = true; dropped(event.dataTransfer.files[0]); });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) dropped(event.clipboardData.files[0]); });
  addEventListener("keydown", keys);
  addEventListener("hashchange", route);
  mapEvents();
}

function keys(event) { // "/" to the words; on a tile: arrows move, Enter opens, x selects, s finds similar ones
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|TEXTAREA|SELECT/.test(event.target.tagName)) return;
  if (event.key === "/") { location.hash.startsWith("#search") || (location.hash = "#search"); $("words").focus(); event.preventDefault(); return; }
  const figure = event.target.closest?.(".tile"), all = [...$("grid").children];
  if (!figure) return;
  const across = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
  if (step) { all[all.indexOf(figure) + step]?.querySelector(".open").focus(); event.preventDefault(); }
  if (event.key === "x") choose(figure.dataset.id, event.shiftKey);
  if (event.key === "s") similar(figure.dataset.id);
}

events();
start().catch((error) => { $("status").textContent = error.message; });
