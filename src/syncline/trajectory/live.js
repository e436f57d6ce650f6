// The page of a run: asks its server every two seconds, draws what changed.
// Whatever a run wrote goes into text nodes and attributes of ours, never into markup.
"use strict";
const PERIOD_MS = 2000, POINTS = 400, TIMELINE_STEPS = 40, NATS_AT_FULL = 5;
const COLOURS = ["--a", "--b", "--c", "--d", "--e", "--f"].map((name) => `var(${name})`);
const server = location.origin + location.pathname.replace(/\/ui\/?$/, "");
const state = { rows: [], offset: 0, groups: [], groupsStart: null, groupsStep: null, chosen: null };
const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "text", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}
const fill = (id, ...children) => $(id).replaceChildren(...children);
function shown(value, unit = "") {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = Number.isInteger(value) || size >= 1000 ? Math.round(value).toLocaleString("en")
    : size >= 100 ? value.toFixed(1) : size >= 0.001 || !size ? String(+value.toPrecision(3)) : value.toExponential(1);
  return unit ? `${text} ${unit}` : text;
}
function duration(seconds) {
  const [h, m, s] = [seconds / 3600, (seconds % 3600) / 60, seconds % 60].map(Math.floor);
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

async function ask(path) {
  const answer = await fetch(server + path);
  if (!answer.ok) throw Object.assign(new Error(`${path}: ${answer.status}`), { status: answer.status });
  return answer.json();
}

async function readSteps() {
  for (;;) {
    let piece;
    try {
      piece = await ask(`/ui/steps?offset=${state.offset}`);
    } catch (error) {
      if (error.status !== 409) throw error;
      piece = null;  // a resumed learner cut the file
    }
    const last = state.rows.at(-1);
    if (!piece || (last && piece.rows.length && piece.rows[0].step <= last.step)) {
      state.rows = [], state.offset = 0;
      continue;
    }
    state.rows.push(...piece.rows);
    state.offset = piece.end;
    if (!piece.rows.length) return;
  }
}
async function readRollouts(before) {
  const piece = await ask("/ui/rollouts" + (before === undefined ? "" : `?before=${before}`));
  const groups = piece.rows.map((group) => ({ ...group, key: `${group.step} ${group.group_id}` }));
  if (before === undefined) {
    const newest = new Set(groups.map((group) => group.key));
    state.groups = state.groups.filter((group) => !newest.has(group.key)).concat(groups);
    state.groupsStart ??= piece.start;
  } else {
    state.groups = groups.concat(state.groups);
    state.groupsStart = piece.start;
  }
}

function thinned(points) {
  const width = Math.ceil(points.length / POINTS), out = [];
  for (let i = 0; i < points.length; i += width) {
    const part = points.slice(i, i + width);
    out.push(part[0].map((_, k) => part.reduce((sum, point) => sum + point[k], 0) / part.length));
  }
  return out;
}
function chart(id, series, { band, width = 600 } = {}) {
  const drawn = series.map(([name, label]) => [label, thinned(
    state.rows.filter((row) => typeof row[name] === "number").map((row) => [row.step, row[name], (band && row[band]) || 0]))])
    .filter(([, points]) => points.length);
  if (!drawn.length) return fill(id, element("figcaption", {}, "not measured yet"));
  const W = width, H = 170, left = 40, bottom = 18;
  const all = drawn.flatMap(([, points]) => points);
  const [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  let [y0, y1] = [Math.min(0, ...all.map((p) => p[1] - p[2])), Math.max(...all.map((p) => p[1] + p[2]))];
  if (y1 <= y0) y1 = y0 + 1;
  const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (W - left - 6);
  const y = (v) => 6 + ((y1 - v) / (y1 - y0)) * (H - bottom - 6);
  const at = (points, offset) => points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1] + offset * p[2]).toFixed(1)}`);
  const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (const value of [y0, (y0 + y1) / 2, y1]) svg.append(
    element("line", { x1: left, x2: W, y1: y(value), y2: y(value), stroke: "var(--line)" }),
    element("text", { x: left - 6, y: y(value) + 3, "text-anchor": "end" }, shown(value)));
  svg.append(element("text", { x: left, y: H - 3 }, `step ${Math.round(x0)}`),
    element("text", { x: W, y: H - 3, "text-anchor": "end" }, Math.round(x1)));
  drawn.forEach(([label, points], i) => {
    if (band && !i) svg.append(element("path", { fill: COLOURS[0], opacity: 0.13,
      d: `M${at(points, 1).join("L")}L${at(points, -1).reverse().join("L")}Z` }));
    const [first, ...rest] = at(points, 0);
    svg.append(element("path", { d: `M${first}L${rest.length ? rest.join("L") : first}`, fill: "none", stroke: COLOURS[i],
      "stroke-width": points.length > 1 ? 1.7 : 5, "stroke-linejoin": "round", "stroke-linecap": "round" },
      element("title", {}, label)));
  });
  fill(id, svg, ...(drawn.length > 1 ? [legend(drawn.map(([label]) => label))] : []));
}
function legend(labels, colours = COLOURS) {
  const entry = (label, i) => {
    const swatch = element("i");
    swatch.style.background = colours[i % colours.length];
    return element("span", {}, swatch, label);
  };
  return element("div", { class: "legend" }, ...labels.map(entry));
}

function drawTimeline() {
  const rows = state.rows.slice(-TIMELINE_STEPS).filter((row) => row["time/step_seconds"]);
  if (!rows.length) return fill("timeline", element("figcaption", {}, "no step yet"));
  const start = rows[0].time - rows[0]["time/step_seconds"], total = rows.at(-1).time - start || 1;
  const W = 1240, x = (time) => ((time - start) / total) * W;
  const svg = element("svg", { viewBox: `0 0 ${W} 58`, role: "img" });
  rows.forEach((row, i) => {
    let time = row.time - row["time/step_seconds"];
    for (const [part, colour] of [["wait", "--line"], ["learn", "--a"], ["sync", "--b"]]) {
      const seconds = row[`time/${part}_seconds`] ?? 0;
      const pause = part === "sync" ? `, the engine paused ${shown(row["sync/pause_seconds"], "s")}` : "";
      svg.append(element("rect", { x: x(time), y: 4, height: 34, width: Math.max(0.5, x(time + seconds) - x(time)),
        fill: `var(${colour})` }, element("title", {}, `step ${row.step}: ${part} ${shown(seconds, "s")}${pause}`)));
      time += seconds;
    }
    if (i % Math.ceil(rows.length / 20) === 0) svg.append(
      element("text", { x: x(row.time), y: 52, "text-anchor": "end" }, `v${row.policy_version ?? "?"}`));
  });
  $("timeline-about").textContent = `the last ${rows.length} steps, ${duration(total)}; below, the version each published`;
  fill("timeline", svg, legend(["waiting for samples", "learning", "publishing weights"], ["var(--line)", "var(--a)", "var(--b)"]));
}

function drawHead() {
  const { run, status, rows } = state, last = rows.at(-1) ?? {}, step = Math.max(status.step, last.step ?? 0);
  document.title = `${step} · ${run.run_id}`;
  $("name").textContent = run.run_id;
  const known = run.num_steps > 0 ? run.num_steps : null;
  const recent = rows.slice(-20).map((row) => row["time/step_seconds"]).filter((s) => s);
  const each = recent.reduce((sum, s) => sum + s, 0) / recent.length;
  const left = known && recent.length && step < known ? `, about ${duration((known - step) * each)} left` : "";
  const since = last.time ? `, last one ${duration(Math.max(0, Date.now() / 1000 - last.time))} ago` : "";
  $("about").textContent = `step ${step}${known ? ` of ${known}` : ""}${left}${since}`;
  $("progress").value = known ? step / known : 0;
  const sampled = last["tokens/sampled"], seconds = last["time/step_seconds"];
  const tiles = [
    ["reward", shown(last.reward), `± ${shown(last.reward_std)}`],
    ["policy version", shown(status.policy_version), "served now"],
    ["queue", `${status.num_queued}`, `of ${status.capacity}; ${status.num_permits} being sampled`],
    ["staleness", shown(last["sample/staleness_mean"]), `oldest ${shown(last["sample/staleness_max"])}`],
    ["last sync", shown(last["time/sync_seconds"], "s"), `paused ${shown(last["sync/pause_seconds"], "s")}`],
    ["tokens / second", shown(sampled && seconds ? sampled / seconds : null), "whole loop"],
    ["dropped as stale", shown(status.counters.stale), `${shown(status.counters.failed)} failed`],
  ];
  fill("tiles", ...tiles.map(([name, value, more]) =>
    element("div", { class: "tile" }, element("small", {}, name), element("b", {}, value), element("small", {}, more))));
}
function table(id, head, rows) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell) => element(tag, {}, cell)));
  fill(id, line(head, "th"), ...rows.map((cells) => line(cells, "td")));
}
function drawQueue() {
  const { status } = state, capacity = Math.max(status.capacity, 1);
  const parts = [["queued", status.num_queued], ["being trained on", status.num_leased], ["being sampled", status.num_permits]];
  fill("queue-bar", ...parts.map(([, count], i) => {
    const part = element("div");
    part.style.cssText = `width: ${(100 * count) / capacity}%; background: ${COLOURS[i]}`;
    return part;
  }));
  fill("queue-legend", legend(parts.map(([name, count]) => `${name} ${count}`)));
  $("queue-about").textContent = `${shown(status.counters.accepted)} groups accepted, ${shown(status.counters.trained)} trained for good`;
  const granted = Object.values(status.environments).reduce((sum, one) => sum + one.num_granted, 0) || 1;
  table("environments", ["environment", "weight", "share", "sampling", "queued", "heard"],
    Object.entries(status.environments).map(([name, one]) => [name, shown(one.weight),
      `${Math.round((100 * one.num_granted) / granted)} %`, one.num_permits, one.num_queued,
      one.seconds_since_heard === null ? "never" : `${duration(one.seconds_since_heard)} ago`]));
  $("why").textContent = status.why_waiting ? `No batch yet: ${status.why_waiting}` : "A batch is ready.";
}
function drawEngines() {
  const { run, rows } = state, last = rows.at(-1) ?? {}, about = run.engine ?? {};
  const what = [about.name, about.version, about.device].filter((part) => part).join(" ");
  const named = run.processes.filter((name) => /^engine(-\d+)?$/.test(name));
  const names = named.length ? named : run.engine ? ["engine"] : [];
  table("engines", ["engine", "what", "process", "version", "last pause", "bytes moved"], names.map((name) =>
    [name, what || "–", named.includes(name) ? "running" : "–", shown(last.policy_version),
      shown(last["sync/pause_seconds"], "s"), shown(last["sync/bytes"])]));
  if (!names.length) fill("engines", element("tr", {}, element("td", {}, "The run's folder tells of no engine.")));
}

function drawGroups() {
  const select = $("groups"), keys = state.groups.map((group) => group.key);
  if (select.dataset.keys !== keys.join()) {
    select.dataset.keys = keys.join();
    select.replaceChildren(...state.groups.toReversed().map((group) => element("option", { value: group.key },
      `step ${group.step} · ${group.environment} · task ${group.task_index}`)));
    select.value = state.chosen ?? keys.at(-1) ?? "";
  }
  $("older").disabled = !state.groupsStart;
  const group = state.groups.find((one) => one.key === select.value);
  if (!group) return fill("group", element("figcaption", {}, "no rollout yet"));
  if ($("group").dataset.key === group.key) return;
  $("group").dataset.key = group.key;
  const prompt = group.prompt.map((message) => `${message.role}\n${message.content}`).join("\n\n");
  fill("group", element("div", { class: "prompt" }, prompt), ...group.rollouts.map(attempt));
}
function attempt(rollout) {
  const parts = Object.entries(rollout.reward_parts).map(([name, value]) => `${name} ${shown(value)}`).join(", ");
  const versions = rollout.versions.length ? `version ${rollout.versions.join(", ")}` : "no version";
  const facts = [`advantage ${shown(rollout.advantage)}`, rollout.status, `${shown(rollout.num_tokens)} tokens`, versions, parts];
  const head = element("p", {}, element("b", {}, `reward ${shown(rollout.reward)}`), ` · ${facts.filter((f) => f).join(" · ")}`);
  const said = element("div", { class: "said" }, ...(rollout.tokens ? tokens(rollout.tokens) : [rollout.completion ?? rollout.error ?? ""]));
  const several = rollout.versions.length > 1 && rollout.tokens;
  const which = several ? [legend(rollout.versions.map((v) => `version ${v}`), rollout.versions.map(versionColour))] : [];
  return element("div", { class: "attempt" }, head, said, ...which);
}
const versionColour = (version) => (version === null ? "transparent" : COLOURS[version % COLOURS.length]);
function tokens({ texts, logprobs, versions, num_left_out }) {
  const spans = texts.map((text, i) => {
    if (logprobs[i] === null && versions[i] === null) return element("span", { class: "given" }, text);
    const told = `logprob ${shown(logprobs[i])}, version ${shown(versions[i])}`;
    const span = element("span", { "data-v": versions[i] ?? "", title: told }, text);
    span.style.setProperty("--s", Math.min(1, -(logprobs[i] ?? 0) / NATS_AT_FULL));
    span.style.setProperty("--v", versionColour(versions[i]));
    return span;
  });
  return num_left_out ? [...spans, element("span", { class: "given" }, ` … ${shown(num_left_out)} more tokens`)] : spans;
}
function colourBy(what) {
  $("group").className = what;
  for (const id of ["by-logprob", "by-version"]) $(id).setAttribute("aria-pressed", id === what);
}

function draw() {
  drawHead();
  chart("reward", [["reward", "reward"]], { band: "reward_std" });
  chart("staleness", [["sample/staleness_mean", "mean"], ["sample/staleness_max", "oldest"]]);
  chart("sync", [["time/sync_seconds", "publishing"], ["sync/pause_seconds", "engine paused"]], { width: 390 });
  chart("waiting", [["queue/length", "groups"]], { width: 390 });
  chart("length", [["completions/mean_length", "mean"], ["completions/max_length", "longest"]], { width: 390 });
  drawTimeline();
  drawQueue();
  drawEngines();
  drawGroups();
}
async function refresh() {
  try {
    [state.status, state.run] = await Promise.all([ask("/status"), ask("/ui/run"), readSteps()]);
    const step = state.rows.at(-1)?.step;
    if (step !== state.groupsStep) await readRollouts();
    state.groupsStep = step;
    draw();
    $("fault").className = "";
  } catch (error) {
    $("fault").className = "on";
    $("fault").textContent = `The trajectory server gave no usable answer (${error.message}); what is shown is from before.`;
  }
  setTimeout(refresh, PERIOD_MS);
}
$("groups").addEventListener("change", (event) => { state.chosen = event.target.value; drawGroups(); });
$("older").addEventListener("click", () => readRollouts(state.groupsStart).then(drawGroups));
for (const id of ["by-logprob", "by-version"]) $(id).addEventListener("click", () => colourBy(id));
refresh();
