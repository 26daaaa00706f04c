// Sends posts, and shows the newest and new ones as they are made. The texts
// that the API sends are put in as text and never as HTML.
const list = document.querySelector("#newest");
const state = document.querySelector("#state");
const one = document.querySelector("#one"); // the link of the route of one post
const form = document.querySelector("#new");
const sent = document.querySelector("#sent");
const shown = 5;

function item(post) {
	const title = document.createElement("a");
	title.href = `/api/posts/${post.id}`;
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
	one.href = list.querySelector("a").href;
}

// load starts with an empty list: what it shows may be out of date.
async function load() {
	list.ariaBusy = true;
	list.replaceChildren();
	const response = await fetch(`/api/posts?limit=${shown}`);
	if (!response.ok) {
		throw new Error(`status ${response.status}`);
	}
	for (const post of await response.json()) {
		add(post);
	}
	list.ariaBusy = false;
}

// A page that has to open its events again waits. The time doubles from the shortest
// to the longest, in milliseconds, until a list has loaded.
const shortest = 500;
const longest = 8000;
let wait = shortest;

// follow opens an EventSource. When its response ends, the browser connects again
// by itself. When the response is not a 200 with events, such as a proxy's 502
// during a restart, the browser closes the EventSource for good, and follow opens
// another. It also does when the list does not load.
function follow() {
	const events = new EventSource("/api/events");
	let loaded = false;
	let reopened = false;

	// The EventSource may close while the list is on its way, which then may fail:
	// the page opens one EventSource for both.
	function reopen(reason) {
		if (reopened) {
			return;
		}
		reopened = true;
		state.textContent = `${reason} Trying again.`;
		events.close();
		setTimeout(follow, wait * (0.5 + Math.random() / 2)); // not all pages at once
		wait = Math.min(2 * wait, longest);
	}
	function reload() {
		load().then(
			() => (wait = shortest),
			(err) => reopen(`The list does not load: ${err.message}.`),
		);
	}

	events.addEventListener("open", () => {
		state.textContent = "New posts appear as they are made.";
		// Not before: a post that is made while the list is on its way comes as an
		// event. After a lost connection, the server sends the events that were
		// missed, or a gap.
		if (!loaded) {
			loaded = true;
			reload();
		}
	});
	events.addEventListener("post", (event) => add(JSON.parse(event.data)));
	events.addEventListener("gap", reload);
	events.addEventListener("error", () => {
		if (events.readyState === EventSource.CLOSED) {
			reopen("The connection is lost.");
		} else {
			state.textContent = "The connection is lost. Trying again.";
		}
	});
}

follow();

// The list shows the new post when its event comes, as every other page does.
form.addEventListener("submit", async (event) => {
	event.preventDefault();
	const fields = new FormData(form);
	sent.textContent = "Sending.";
	try {
		const response = await fetch("/api/posts", {
			method: "POST",
			headers: { "Content-Type": "application/json" },
			body: JSON.stringify({ title: fields.get("title"), body: fields.get("body") }),
		});
		const result = await response.json();
		if (!response.ok) {
			throw new Error(result.error);
		}
		form.reset();
		sent.textContent = `Post ${result.id} is made.`;
	} catch (err) {
		sent.textContent = `Not posted: ${err.message}.`;
	}
});

// The page does not know its own address before it is opened.
document.querySelector(".origin").textContent = location.origin;
