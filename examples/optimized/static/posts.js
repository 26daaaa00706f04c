// Shows the newest posts on the page of the service. What the API sends is put
// in as text and never as HTML.
const list = document.querySelector("#newest");

async function show() {
	const reply = await fetch("/api/posts?limit=5");
	if (!reply.ok) {
		throw new Error(`the list could not be had: ${reply.status}`);
	}
	for (const post of await reply.json()) {
		const title = document.createElement("strong");
		title.textContent = post.title;
		const item = document.createElement("li");
		item.append(title, " ", post.body);
		list.append(item);
	}
}

show().catch((err) => {
	list.textContent = err.message;
});
