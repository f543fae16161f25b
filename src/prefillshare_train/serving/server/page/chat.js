// One conversation that any decoder may continue. All text goes into the page as text nodes.

import { milliseconds, startCharts, tint } from "/page/charts.js";

const find = (id) => document.getElementById(id);
const log = find("log");
const text = find("text");
const decoders = [];
let messages = [];
let session = newSession();
let running = null;
let loading = false;

function newSession() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function request(path, options = {}) {
  const key = find("key").value.trim();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers, cache: "no-store" });
}

// ---- decoders and the server's state -------------------------------------------------------

async function loadDecoders() {
  const response = await request("/v1/models");
  if (response.status === 401) {
    find("settings").open = true;
    find("key").focus();
    showState("needs a key");
    return false;
  }
  const models = (await response.json()).data.map((model) => model.id);
  decoders.splice(0, decoders.length, ...models);
  const choices = models.map((name, index) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("span");
    label.className = tint(index);
    Object.assign(input, { type: "radio", name: "decoder", value: name, checked: index === 0 });
    shown.textContent = name;
    label.append(input, shown);
    return label;
  });
  find("decoders").append(...choices);
  startCharts(decoders, request, showState);
  return true;
}

function showState(state) {
  if (find("server").dataset.state === state) return;
  find("server").dataset.state = state;
  find("server").textContent = state;
}

// ---- the conversation ----------------------------------------------------------------------

function addMessage(kind, who, content) {
  const item = document.createElement("article");
  const name = document.createElement("span");
  const body = document.createElement("p");
  item.className = kind;
  name.className = "who";
  name.textContent = who;
  body.className = "body";
  body.append(document.createTextNode(content));
  item.append(name, body);
  log.append(item);
  find("empty").hidden = true;
  log.scrollTop = log.scrollHeight;
  return { item, words: body.firstChild };
}

function showCost(item, usage) {
  const { prefilled_tokens: prefilled, decoder_prompt_tokens: own, ttft_s: ttft } = usage.prefillshare;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  for (const [kind, count] of [["cached", cached], ["prefilled", prefilled], ["own", own]]) {
    const part = document.createElement("span");
    part.className = kind;
    part.style.flexGrow = count;
    if (count > 0) bar.append(part);
  }
  const cost = document.createElement("p");
  cost.className = "cost";
  cost.textContent = `${usage.prompt_tokens} prompt tokens: ${cached} cached, ${prefilled} prefilled, `
    + `${own} by the decoder · first token after ${milliseconds(ttft)} · `
    + `${usage.completion_tokens} answer tokens`;
  Object.assign(item.dataset, { cached, prefilled });
  item.append(bar, cost);
  log.scrollTop = log.scrollHeight;
  return cost.textContent;
}

async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function body(model) {
  const system = find("system").value.trim();
  const maxTokens = find("max-tokens").valueAsNumber;
  const temperature = find("temperature").valueAsNumber;
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: Number.isFinite(temperature) ? temperature : 0,
    ...(Number.isFinite(maxTokens) ? { max_tokens: maxTokens } : {}),
    session_id: session,
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function answer(model, item, words, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body(model)),
    signal,
  });
  if (!response.ok) {
    const failure = await response.json().catch(() => null);
    throw new Error(failure?.error?.message ?? `the server answered ${response.status}`);
  }
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const content = chunk.choices[0]?.delta.content;
    if (content) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      words.appendData(content);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    if (chunk.usage) find("announce").textContent = `${model} answered. ${showCost(item, chunk.usage)}`;
  }
}

async function send() {
  const question = text.value.trim();
  const chosen = document.querySelector("input[name=decoder]:checked");
  if (!question || running || !chosen) return;
  const model = chosen.value;
  problem("");
  messages.push({ role: "user", content: question });
  const asked = addMessage("user", "You", question);
  text.value = "";
  const { item, words } = addMessage(`answer ${tint(decoders.indexOf(model))}`, model, "");
  item.setAttribute("aria-busy", "true");
  running = new AbortController();
  const mine = running;
  busy(true);
  try {
    await answer(model, item, words, mine.signal);
  } catch (error) {
    if (mine.signal.reason === "new") return;
    if (error.name !== "AbortError" && error !== "stop") problem(error.message ?? String(error));
  } finally {
    item.removeAttribute("aria-busy");
    if (running === mine) {
      running = null;
      busy(false);
    }
  }
  if (words.data || item.dataset.cached !== undefined) {
    messages.push({ role: "assistant", content: words.data });
  } else {
    // Nothing came: the question goes back to where it was written.
    messages.pop();
    asked.item.remove();
    item.remove();
    if (!text.value) text.value = question;
  }
}

function problem(message) {
  find("problem").textContent = message;
  find("problem").hidden = !message;
}

function busy(is) {
  find("send").disabled = is;
  find("stop").disabled = !is;
}

function startAgain() {
  running?.abort("new");
  running = null;
  busy(false);
  messages = [];
  session = newSession();
  log.replaceChildren();
  find("empty").hidden = false;
  problem("");
  text.focus();
}

// ---- controls ------------------------------------------------------------------------------

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort("stop");
});
find("stop").addEventListener("click", () => running?.abort("stop"));
find("new").addEventListener("click", startAgain);
find("key").addEventListener("change", () => {
  if (decoders.length === 0) begin();
});

async function begin() {
  if (loading) return;
  loading = true;
  try {
    if (await loadDecoders()) text.focus();
  } catch {
    showState("offline");
    setTimeout(begin, 2000);
  } finally {
    loading = false;
  }
}
begin();
