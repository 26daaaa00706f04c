// Sends posts, shows the newest, and new ones as they are made. What the API
// sends is put in as text and never as HTML.
const list = document.querySelector("#newest");
const state = document.querySelector("#state");
const form = document.querySelector("#new");
const sent = document.querySelector("#sent");
const shown = 5;

function item(post) {
	const title = document.createElement("strong");
	title.textContent = post.title;
	const li = document.createElement("li");
	li.dataset.id = post.id;
	li.append(title, " ", post.body);
	return li;
}

// add puts a post where its id belongs: the list that is fetched and the event
// may both bring it, in either order.
function add(post) {
	let next = list.firstElementChild;
	while (next && Number(next.dataset.id) > post.id) {
		next = next.nextElementSibling;
	}
	if (next && Number(next.dataset.id) === post.id) {
		return;
	}
	list.insertBefore(item(post), next);
	while (list.childElementCount > shown) {
		list.lastElementChild.remove();
	}
}

async function load() {
	const reply = await fetch(`/api/posts?limit=${shown}`);
	if (!reply.ok) {
		throw new Error(`The list could not be had: ${reply.status}.`);
	}
	for (const post of await reply.json()) {
		add(post);
	}
}

// reload begins with an empty list: posts that were missed, or are no more.
function reload() {
	list.replaceChildren();
	load().catch((err) => {
		state.textContent = err.message;
	});
}

// follow connects. The browser comes back by itself when a response ends, but
// takes any status other than 200 for final, such as a proxy's 502 while the
// service restarts: then follow connects anew.
function follow() {
	const events = new EventSource("/api/events");
	let connected = false;
	events.addEventListener("open", () => {
		state.textContent = "New posts appear as they are made.";
		// Only now: what is made while the list is on its way comes as an event.
		// When the connection was lost, what it missed is sent again, or a gap.
		if (!connected) {
			connected = true;
			reload();
		}
	});
	events.addEventListener("post", (event) => add(JSON.parse(event.data)));
	events.addEventListener("gap", reload);
	events.addEventListener("error", () => {
		state.textContent = "The connection is lost. It is tried again.";
		if (events.readyState === EventSource.CLOSED) {
			setTimeout(follow, 2000 + 8000 * Math.random());
		}
	});
}

follow();

// The list shows the new post when its event comes, as on every other page.
form.addEventListener("submit", async (event) => {
	event.preventDefault();
	const fields = new FormData(form);
	sent.textContent = "Sending.";
	try {
		const reply = await fetch("/api/posts", {
			method: "POST",
			headers: { "Content-Type": "application/json" },
			body: JSON.stringify({ title: fields.get("title"), body: fields.get("body") }),
		});
		const result = await reply.json();
		if (!reply.ok) {
			throw new Error(result.error);
		}
		form.reset();
		sent.textContent = `Post ${result.id} is made.`;
	} catch (err) {
		sent.textContent = `Not posted: ${err.message}.`;
	}
});
