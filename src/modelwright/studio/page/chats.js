// The list of conversations that the server keeps: open one, or delete it after a second press.

import { deleteChat, readChat, readChats } from "./api.js";

const $ = (id) => document.getElementById(id);

/** Show the list; `open` is called with a conversation, `restart` when the one that is shown was deleted. */
export async function listChats(current, open, restart) {
  let chats = [];
  try {
    chats = await readChats();
  } catch (error) {
    $("chats-note").textContent = error.message;
  }
  $("chats").hidden = chats.length === 0;
  $("chats-count").textContent = String(chats.length);
  $("chats-list").replaceChildren(...chats.map((chat) => row(chat, current, open, restart)));
}

function row(chat, current, open, restart) {
  const item = document.createElement("li");
  const name = document.createElement("button");
  name.type = "button";
  name.className = "chat-name";
  name.textContent = chat.title || "Without words";
  if (chat.id === current) name.setAttribute("aria-current", "true");
  name.addEventListener("click", () => attempt(async () => {
    open(await readChat(chat.id));
    $("chats").open = false;
  }));
  const remove = document.createElement("button");
  remove.type = "button";
  remove.className = "chat-remove";
  remove.textContent = "Delete";
  remove.setAttribute("aria-label", `Delete: ${name.textContent}`);
  remove.addEventListener("click", () => {
    if (remove.dataset.asked !== "yes") {
      remove.dataset.asked = "yes";
      remove.textContent = "Really?";
      remove.setAttribute("aria-label", `Really delete: ${name.textContent}`);
      return;
    }
    attempt(async () => {
      await deleteChat(chat.id);
      if (chat.id === current) restart();
      else await listChats(current, open, restart);
    });
  });
  item.append(name, remove);
  return item;
}

async function attempt(work) {
  $("chats-note").textContent = "";
  try {
    await work();
  } catch (error) {
    $("chats-note").textContent = error.message;
  }
}
