// Talking to the server: facts, documents, and a streamed answer. Every failure leaves as an Error in plain words.

const GONE = "The server does not answer. It may have been stopped. Start it again, then ask once more.";
const BROKEN = "The answer broke off before it was complete. Ask again.";

const KEY = "modelwright-api-key"; // kept until the tab is closed

async function request(path, options = {}) {
  let response = await send(path, options);
  // A server with keys says so once; the key is asked for and the request sent again.
  if (response.status === 401) {
    const key = window.prompt("This server asks for an API key.");
    if (key) {
      sessionStorage.setItem(KEY, key.trim());
      response = await send(path, options);
    }
  }
  if (response.status === 401) sessionStorage.removeItem(KEY);
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(GONE);
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with an error (${response.status}) and gave no reason.`;
  }
}

/** What is served: model, name, mode, num_documents, examples. */
export async function readInfo() {
  return (await request("/api/info")).json();
}

/** One document of the index: id, title, text. */
export async function readDocument(id) {
  return (await request(`/api/document?id=${encodeURIComponent(id)}`)).json();
}

/** The tokenizers that are there, and how long a text may be. */
export async function readTokenizers() {
  return (await request("/api/tokenizers")).json();
}

/** A text as every tokenizer splits it: name, tokens, and how much one carries. */
export async function tokenize(text, signal) {
  return (await post("/api/tokenize", { text }, signal)).json();
}

/** The conversations that are kept, the newest first: id, title, num_turns. */
export async function readChats() {
  return (await (await request("/api/chats")).json()).chats;
}

/** One conversation: id, title, turns. */
export async function readChat(id) {
  return (await request(`/api/chats/${id}`)).json();
}

/** Begin a conversation; its id. */
export async function newChat() {
  return (await (await post("/api/chats", {})).json()).id;
}

export async function deleteChat(id) {
  await request(`/api/chats/${id}`, { method: "DELETE" });
}

/** Ask in a conversation that the server keeps; otherwise as `ask`. */
export async function* askInChat(id, question, signal) {
  yield* pieces(await post(`/api/chats/${id}/ask`, { question }, signal));
}

/** Ask, and yield {text} pieces, then one {citations, mode, is_supported, finish_reason}. Aborting the signal stops it. */
export async function* ask(model, messages, signal) {
  yield* pieces(await post("/v1/chat/completions", { model, messages, stream: true }, signal));
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function* pieces(response) {
  let isDone = false;
  for await (const data of events(response.body.getReader())) {
    if (data === "[DONE]") {
      isDone = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { ...choice.delta, finish_reason: choice.finish_reason };
  }
  if (!isDone) throw new Error(BROKEN);
}

/** Yield the data of each server-sent event. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice("data: ".length);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(BROKEN);
  } finally {
    reader.cancel().catch(() => {});
  }
}
